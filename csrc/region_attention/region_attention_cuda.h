// region_attention on a CUDA device. The forward contract; the maths and the layouts are those of region_attention.h.
//
// q, k and v are float32, float16 or bfloat16, D at most 128, the table float32. Logits and softmax are float32; for the
// 16-bit types the unnormalised probabilities are rounded to that type before they meet the values. Two runs give the
// same bits. Nothing but the results is written to memory.
#pragma once

#include "region_attention.h"

namespace lpmflow {

constexpr int64_t kMostRegionWidth = 128;

struct RegionCudaArgs {
  RegionAttentionShape shape;
  Rows q, k, v;
  const float* table;  // (H, columns) contiguous
  void* attended;      // (B, N, H, D) contiguous, dtype; 16-byte aligned
  float* statistics;   // (2, B, H, N) contiguous, or null: for each row of S the largest, 1 / sum of e^(S - largest)
};

// Enqueues the work on `stream` (a cudaStream_t; null is the default stream) of `device` and returns: a cudaError_t,
// 0 for success. It neither allocates nor waits, so it may be captured into a CUDA graph.
// Rows of q, k and v that begin at multiples of 16 bytes, with D a multiple of 16 bytes, are read fastest.
int region_attention_forward_cuda(const RegionCudaArgs& args, int device, void* stream);

}  // namespace lpmflow
