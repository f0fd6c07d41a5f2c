// region_attention: joint attention of two images' tokens with the region-based relative position bias. The CPU contract.
//
//   S[b, h, i, j] = scale q[b, h, i] . k[b, h, j] + bias[h, i, j],   P = softmax of S over j
//   attended[b, i, h] = sum over j of P[b, h, i, j] v[b, h, j]
//   bias[h, i, j] = table[h, ((r - r' + hm - 1)(2 wm - 1) + (c - c' + wm - 1)) 4 + 2 a + b]
//
// where token i is the patch (r, c) of image a and token j the patch (r', c') of image b, 0 the source and 1 the target;
// (hm, wm) are the larger sides of the two grids. A prefix token has no bias. The tokens are [prefix, source patches,
// prefix, target patches], patches row by row: N = 2 prefix + source + target.
// q, k and v are (B, H, N, D), N, D >= 1, of element type `dtype`; the table is (H, columns), dense. "Exact" is float32,
// for float64 float64, and what sums are formed in. No memory grows with N^2.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/rows.h"
#include "../common/status.h"

namespace lpmflow {

struct RegionAttentionShape {
  int64_t batch, heads, width, prefix;
  int64_t height[2], across[2];  // of the source and the target grid
  double scale;
  Dtype dtype;
  int threads;
};

struct RegionAttentionForward {
  RegionAttentionShape shape;
  Rows q, k, v;
  const void* table;  // exact
  void* attended;     // (B, N, H, D) dense, dtype: heads inside the tokens, as what follows reads them
};

// With dP[i, j] = grad_attended[i] . v[j] and dS = P (dP - sum over j of P dP):
//   grad_q[i] = scale sum over j of dS[i, j] k[j]
//   grad_k[j] = scale sum over i of dS[i, j] q[i]
//   grad_v[j] = sum over i of P[i, j] grad_attended[i]
//   grad_table[h, column] = sum of dS[b, h, i, j] over b and the pairs (i, j) with that column
// P is computed anew. Deterministic for a given number of threads.
struct RegionAttentionBackward {
  RegionAttentionShape shape;
  Rows q, k, v;
  const void* table;                // exact
  Rows grad_attended;               // (B, H, N, D)
  void *grad_q, *grad_k, *grad_v;   // (B, H, N, D) dense, dtype
  void* grad_table;                 // (H, columns) dense, exact
};

}  // namespace lpmflow
