// The CUDA cross_scale_fusion as a shared library for the CPU: the kernels' own source on the emulated device.
#define LPMFLOW_EMULATE
#include "../cross_scale_fusion/cross_scale_fusion.cu"

// As cross_scale_fusion_forward_cuda; threads of a block run in an order that `seed` determines.
extern "C" int cross_scale_fusion_forward_emulated(const lpmflow::FusionCudaArgs* args, uint64_t seed) {
  lpmflow::emulated::machine().random.seed(seed);
  return lpmflow::cross_scale_fusion_forward_cuda(*args, 0, nullptr);
}

// What went wrong in the last launch.
extern "C" const char* emulated_problem() { return lpmflow::emulated::machine().problem.c_str(); }
