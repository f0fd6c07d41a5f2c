// cross_scale_fusion on a CUDA device. The forward contract; the maths and the layouts are those of cross_scale_fusion.h.
//
// corr is float32, float16 or bfloat16, everything else float32. Two runs give the same bits. Nothing but the results is
// written to memory.
#pragma once

#include "cross_scale_fusion.h"

namespace lpmflow {

constexpr int kMostScales = 8;  // of one launch: an argument of a kernel has a fixed size

struct FusionCudaArgs {
  FusionScale scale[kMostScales];  // the scales of this launch
  int64_t first_scale, count;      // scale[0] is number first_scale of all, and how many of them there are here
  int64_t scales;                  // of the whole operation
  int64_t batch, h, w, first_row, rows;
  float exponent;  // log2(e) / temperature, neither 0 nor infinite
  Dtype dtype;
  const float *x, *y;
  float *mapping, *confidence, *largest;
};

// Enqueues the work on `stream` (a cudaStream_t; null is the default stream) of `device` and returns: a cudaError_t,
// 0 for success, or -kOtherLines, as cross_scale_fusion.h has it. It neither allocates nor waits, so it may be captured into a CUDA graph.
int cross_scale_fusion_forward_cuda(const FusionCudaArgs& args, int device, void* stream);

}  // namespace lpmflow
