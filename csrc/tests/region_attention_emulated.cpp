// The CUDA region_attention as a shared library for the CPU: the kernels' own source on the emulated device.
#define LPMFLOW_EMULATE
#include "../region_attention/region_attention.cu"

// As region_attention_forward_cuda; threads of a block run in an order that `seed` determines.
extern "C" int region_attention_forward_emulated(const lpmflow::RegionCudaArgs* args, uint64_t seed) {
  lpmflow::emulated::machine().random.seed(seed);
  return lpmflow::region_attention_forward_cuda(*args, 0, nullptr);
}

// What went wrong in the last launch.
extern "C" const char* emulated_problem() { return lpmflow::emulated::machine().problem.c_str(); }

// The places of a token as a query and as a key.
extern "C" void region_places(const lpmflow::RegionAttentionShape* shape, int token, int* to) {
  const lpmflow::RegionPlaces places(*shape);
  to[0] = places.query(token);
  to[1] = places.key(token);
}
