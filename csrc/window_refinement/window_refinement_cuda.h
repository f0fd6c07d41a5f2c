// Window attention on a CUDA device. The forward contract; the maths and the layouts are those of window_refinement.h.
//
// float32, float16 or bfloat16, the table float32; head widths up to 128, windows of up to 32 x 32 cells. Logits and
// softmax are float32; for the 16-bit types the unnormalised probabilities are rounded to that type before they meet the
// values. Two runs give the same bits. Nothing but the result is written to memory.
#pragma once

#include "window_refinement.h"

namespace lpmflow {

constexpr int64_t kMostHeadWidth = 128, kMostWindow = 32;

struct WindowCudaArgs {
  WindowShape shape;
  Cells qkv;           // dtype
  const float* table;  // ((2 window - 1)^2, heads) contiguous
  void* out;           // (B, height, width, C) contiguous, dtype; 16-byte aligned
};

// Enqueues the work on `stream` (a cudaStream_t; null is the default stream) of `device` and returns: a cudaError_t,
// 0 for success. It neither allocates nor waits, so it may be captured into a CUDA graph.
// Heads that begin and end at multiples of 16 bytes, or of 8 where they are short, are read fastest.
int window_refinement_forward_cuda(const WindowCudaArgs& args, int device, void* stream);

}  // namespace lpmflow
