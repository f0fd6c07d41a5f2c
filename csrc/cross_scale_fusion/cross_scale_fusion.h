// cross_scale_fusion: S correlation tensors to expected target coordinates on one grid. The CPU contract.
//
//   u[b, s, c, j] = corr_s interpolated bilinearly (align_corners) at output source cell c and output target cell j
//   p[b, s, c, j] = exp(u / temperature) / sum over j' of the same
//   mapping[b, s, 0, c] = sum over j of p x[column of j],    mapping[b, s, 1, c] the same with y[row of j]
//   largest[b, s, c] = max over j of u,    confidence[b, s, c] = max over j of p
//
// corr_s is (B, hs ws, ht wt) of element type `dtype`, its last dimension dense; both output grids are (h, w). A side
// whose grid is (h, w) already is not interpolated. x is (w), y is (h). Everything but corr is float32 (float64 for
// float64), and contiguous. No buffer is larger than one row of u.
//
// A part of the output lines can be computed from a part of the coarse lines, of which it must have all that belong to
// these output lines (and, where the source side is not interpolated, no others); kOtherLines is returned where not.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/status.h"

namespace lpmflow {

struct FusionScale {
  const void* corr;
  int64_t batch, row;  // strides in elements
  int64_t hs, ws, ht, wt;
  int64_t first_line, lines;  // of the source grid, that corr begins with and has
  void* grad;  // backward: (B, lines ws, ht wt) contiguous, zeros unless the source grid is (h, w)
};

struct CrossScaleFusion {
  const FusionScale* scale;
  int64_t scales, batch, h, w;
  int64_t first_row, rows;  // of the output source grid: what is computed
  double temperature;
  Dtype dtype;
  int threads;
  const void *x, *y;
  // (B, S, 2, rows, w), (B, S, rows, w), (B, S, rows, w): written by the forward, read by the backward.
  void *mapping, *confidence, *largest;
};

// With g the gradient of mapping: dL/du[j] = p[j] ((x[j] - mapping_x) g_x + (y[j] - mapping_y) g_y) / temperature, then
// the transposes of the interpolations; grad_x[column] = sum over b, s, c of g_x sum over rows of p. Deterministic, for
// any number of threads.
struct CrossScaleFusionBackward {
  CrossScaleFusion op;
  const void* grad_mapping;  // (B, S, 2, rows, w)
  void *grad_x, *grad_y;     // (w), (h), or both null: not wanted
};

}  // namespace lpmflow
