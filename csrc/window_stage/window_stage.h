// window_stage: one Swin block on a map, its outer normalisation and residual, and the map's pooled statistics, for
// inference. The CPU contract.
//
//   y = x + proj(attention(qkv(norm1(x))))         attention of window_refinement, without shift
//   z = y + fc2(gelu(fc1(norm2(y))))
//   out = x + norm_out(z)
//   mean[b, c], highest[b, c]: of out over the cells of the map
//
// x is (B, height, width, C); everything is float32, or everything is float64. Vectors and matrices are contiguous, a
// linear layer's weight is (outputs, inputs). Nothing of the size of the map is allocated. The result does not depend
// on the number of threads.
#pragma once

#include "../window_refinement/window_refinement.h"

namespace lpmflow {

struct LayerWeights {
  const void *weight, *bias;
};

struct WindowStage {
  WindowShape shape;
  int64_t hidden;  // between fc1 and fc2
  double eps;      // of the normalisations
  Cells x;
  LayerWeights norm1, qkv, proj, norm2, fc1, fc2, norm_out;
  const void* table;
  void* out;      // (B, height, width, C) contiguous
  void* mean;     // (B, C)
  void* highest;  // (B, C)
};

}  // namespace lpmflow
