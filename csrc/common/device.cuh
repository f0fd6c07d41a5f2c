// What the CUDA kernels ask of the hardware beyond plain CUDA C++: each function is about one PTX instruction (sm_80).
//
// With LPMFLOW_EMULATE defined a C++ compiler reads the kernels instead of nvcc, and every name below comes from
// tests/emulated_device.h, which runs the threads of a block in turn on the CPU. Kernels therefore use no other PTX.
#pragma once

#ifdef LPMFLOW_EMULATE
#include "../tests/emulated_device.h"
#else

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace lpmflow {

// 16-bit floats as bits: kernels only move them, convert to them and hand them to the tensor cores.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Begins to copy kBytes aligned bytes, 16 or 8, to shared memory, or zeros when `valid` is false; `global` must be an
// address that may be read in either case.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
  } else {
    static_assert(kBytes == 8, "16 or 8 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid ? 8 : 0) : "memory");
  }
}

// Closes this thread's group of copies begun since the last call.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending newest groups of this thread are under way. Other threads see the copies after a
// __syncthreads().
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and gets in
// registers[x] the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix x; or, transposed, its elements
// (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4). The first is in the lower half.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8), T being Float16 or BFloat16. With g = lane / 4 and t = 2 (lane % 4):
//   a[0], a[1], a[2], a[3] hold columns t, t + 1 of row g; of row g + 8; columns t + 8, t + 9 of row g; of row g + 8
//   b0, b1 hold rows t, t + 1 of column g; rows t + 8, t + 9
//   c0, c1 are row g, columns t, t + 1; c2, c3 row g + 8
template <class T>
__device__ __forceinline__ void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<Float16>(float& c0, float& c1, float& c2, float& c3,
                                                      const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float& c0, float& c1, float& c2, float& c3,
                                                       const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to the nearest T, `low` in the lower half. NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// As float32, exactly.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// 2^x to a relative 2^-22; results below the normal numbers are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Makes `device` current in its scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

constexpr int kMostShared = 99 * 1024;  // that a block may have on sm_86, sm_89 and sm_120; elsewhere it is more

// Launches kKernel on `stream` of the current device, `device`. More than the 48 KB of shared memory that need no asking
// are asked for once per kernel and device.
template <auto kKernel, class... Arguments>
cudaError_t launch(int64_t blocks, int threads, int shared_bytes, int device, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks > INT32_MAX || shared_bytes > kMostShared) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    static std::atomic<uint64_t> asked{0};  // a bit per device; those above 63 ask every time
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((asked.load() & bit) == 0) {
      const cudaError_t status =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
      if (status != cudaSuccess) return status;
      asked.fetch_or(bit);
    }
  }
  kKernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace lpmflow

#endif  // LPMFLOW_EMULATE
