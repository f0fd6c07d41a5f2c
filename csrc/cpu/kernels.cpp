#include "kernels.h"

namespace lpmflow {

namespace baseline {
CpuKernels table();
}

#if defined(LPMFLOW_X86)
namespace avx2 {
CpuKernels table();
}
namespace avx512 {
CpuKernels table();
}
#endif

namespace {

CpuKernels with(CpuKernels kernels, bool (*supported)()) {
  kernels.supported = supported;
  return kernels;
}

}  // namespace

const CpuKernels kCpuKernels[] = {
#if defined(LPMFLOW_X86)
    with(avx512::table(),
         [] {
           return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("fma");
         }),
    with(avx2::table(), [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
    with(baseline::table(), [] { return true; }),
    CpuKernels{},
};

}  // namespace lpmflow
