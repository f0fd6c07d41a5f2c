// For both sides: CUDA kernels use it, and so do tests on a machine without a GPU.
#pragma once

#ifdef __CUDACC__
#define LPMFLOW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LPMFLOW_HOST_DEVICE inline
#endif

namespace lpmflow {

// Several floats, aligned for one load or store.
struct alignas(8) Float2 {
  float x[2];
};
struct alignas(16) Float4 {
  float x[4];
};

}  // namespace lpmflow
