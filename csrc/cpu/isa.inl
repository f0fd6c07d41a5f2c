// Body of one instruction set's translation unit: instantiates every CPU kernel and gathers them in a table.
#include "../correlation/correlation_cpu.h"
#include "kernels.h"

#define LPMFLOW_STRING_OF(x) #x
#define LPMFLOW_STRING(x) LPMFLOW_STRING_OF(x)

namespace lpmflow {
namespace LPMFLOW_ISA {

CpuKernels table() {
  return {LPMFLOW_STRING(LPMFLOW_ISA), nullptr, LPMFLOW_HAS_FLOAT16 != 0, correlation_forward, correlation_backward};
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
