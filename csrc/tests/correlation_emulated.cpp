// The CUDA correlation as a shared library for the CPU: the kernels' own source on the emulated device.
#define LPMFLOW_EMULATE
#include "../correlation/correlation.cu"

// As correlation_forward_cuda; threads of a block run in an order that `seed` determines.
extern "C" int correlation_forward_emulated(const lpmflow::CorrelationCudaArgs* args, uint64_t seed) {
  lpmflow::emulated::machine().random.seed(seed);
  return lpmflow::correlation_forward_cuda(*args, 0, nullptr);
}

// What went wrong in the last launch.
extern "C" const char* emulated_problem() { return lpmflow::emulated::machine().problem.c_str(); }
