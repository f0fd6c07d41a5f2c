#include "kernels.h"

namespace lpmflow {

#define LPMFLOW_DECLARE(isa)                                               \
  namespace isa {                                                          \
  int run_correlation_forward(const CorrelationForward& op);               \
  int run_correlation_backward(const CorrelationBackward& op);             \
  int run_cross_scale_fusion_forward(const CrossScaleFusion& op);          \
  int run_cross_scale_fusion_backward(const CrossScaleFusionBackward& op); \
  int run_region_attention_forward(const RegionAttentionForward& op);      \
  int run_region_attention_backward(const RegionAttentionBackward& op);    \
  int run_window_refinement_forward(const WindowForward& op);              \
  int run_window_refinement_backward(const WindowBackward& op);            \
  int run_window_stage(const WindowStage& op);                             \
  }

#define LPMFLOW_KERNELS(isa, supported)                                                            \
  CpuKernels {                                                                                     \
    #isa, supported,                                                                               \
    isa::run_correlation_forward, isa::run_correlation_backward,                                   \
    isa::run_cross_scale_fusion_forward, isa::run_cross_scale_fusion_backward,                     \
    isa::run_region_attention_forward, isa::run_region_attention_backward,                         \
    isa::run_window_refinement_forward, isa::run_window_refinement_backward, isa::run_window_stage \
  }

LPMFLOW_DECLARE(baseline)
#if defined(LPMFLOW_X86)
LPMFLOW_DECLARE(avx2)
LPMFLOW_DECLARE(avx512)
#endif

namespace {

bool always() { return true; }

#if defined(LPMFLOW_X86)
// What build.py compiles each file with.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

constexpr CpuKernels kTable[] = {
#if defined(LPMFLOW_X86)
    LPMFLOW_KERNELS(avx512, has_avx512),
    LPMFLOW_KERNELS(avx2, has_avx2),  // every machine with AVX2 has the conversions of F16C
#endif
    LPMFLOW_KERNELS(baseline, always),
    CpuKernels{},
};

const CpuKernels* const kCpuKernels = kTable;

}  // namespace lpmflow
