// The CUDA window attention as a shared library for the CPU: the kernels' own source on the emulated device.
#define LPMFLOW_EMULATE
#include "../window_refinement/window_refinement.cu"

// As window_refinement_forward_cuda; threads of a block run in an order that `seed` determines.
extern "C" int window_refinement_forward_emulated(const lpmflow::WindowCudaArgs* args, uint64_t seed) {
  lpmflow::emulated::machine().random.seed(seed);
  return lpmflow::window_refinement_forward_cuda(*args, 0, nullptr);
}

// What went wrong in the last launch.
extern "C" const char* emulated_problem() { return lpmflow::emulated::machine().problem.c_str(); }

// The index arithmetic, for the host.
extern "C" int small_quotient(int x, int divisor) { return lpmflow::SmallDivisor(divisor).quotient(x); }

// (window, head, first query) of every group, and how many groups a block has; the number of groups.
extern "C" int64_t window_groups(const lpmflow::WindowShape* shape, int warp_rows, int64_t* to, int64_t* of_block) {
  const lpmflow::WindowBlocks blocks(*shape, warp_rows);
  *of_block = blocks.groups();
  for (int64_t item = 0; item < blocks.items; ++item) {
    const lpmflow::WindowBlocks::Work work = blocks.work(item);
    to[3 * item] = work.window;
    to[3 * item + 1] = work.head;
    to[3 * item + 2] = work.query;
  }
  return blocks.items;
}
