// correlation on a CUDA device. The forward contract; the maths is that of correlation.h.
//
//   P[b, h, i, j] = exp(scale q[b, h, i] . k[b, h, j]) / sum over j' of the same
//   attended[b, h, i] = sum over j of P[b, h, i, j] v[b, h, j]
//   corr[b, i - prefix, j - prefix] = sum over h of P[b, h, i, j]          for i, j >= prefix
//   lse[b, h, i] = log(sum over j of exp(scale q[b, h, i] . k[b, h, j]))
//
// q is (B, H, N, D), k and v are (B, H, M, D), N, M >= max(prefix, 1), 1 <= D <= 256, of element type `dtype`: float16,
// bfloat16 or float32. Logits, softmax and head sum are float32; for the 16-bit types the unnormalised probabilities
// are rounded to that type before they meet the values. Two runs give the same bits. Nothing of size B H N M exists.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace lpmflow {

struct CorrelationCudaArgs {
  const void* q; const void* k; const void* v;      // strides in elements; the last dimension is dense
  int64_t q_stride[3], k_stride[3], v_stride[3];    // of B, H, N or M
  void* attended;                                   // (B, H, N, D) contiguous, dtype; 16-byte aligned
  float* corr;                                      // (B, N - prefix, M - prefix) contiguous; 16-byte aligned
  float* lse;                                       // (B, H, N) contiguous
  int64_t batch, heads, n, m, width, prefix;
  float scale;
  Dtype dtype;
};

// Enqueues the work on `stream` (a cudaStream_t; null is the default stream) of `device` and returns: a cudaError_t,
// 0 for success. It neither allocates nor waits, so it may be captured into a CUDA graph.
// Rows of q, k and v that begin at multiples of 16 bytes, with D a multiple of 16 bytes, are read fastest.
int correlation_forward_cuda(const CorrelationCudaArgs& args, int device, void* stream);

}  // namespace lpmflow
