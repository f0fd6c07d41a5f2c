// window_refinement: self-attention inside the square windows of a map, with a relative position bias. The CPU contract.
//
// qkv is (B, height, width, 3 C), thirds q, k, v, each with `heads` heads of `head_width` inside; C = heads head_width.
//   P[h, i, j] = softmax over the cells j of i's window of  scale q[h, i] . k[h, j] + table[offset(i, j), h]
//   out[h, i] = sum over j of P[h, i, j] v[h, j]
//   offset(i, j) = (dr + window - 1)(2 window - 1) + (dc + window - 1),  (dr, dc) = cell i - cell j
//
// Windows cut each axis at 0, window, 2 window, ...; with a shift, at 0, shift, shift + window, .... That is all of
// Swin's cyclic shift with its mask: the cells that wrap around never see those they are moved next to. The last window
// of an axis may be smaller. Sums are formed in float32 (float64 for float64). Nothing of the size of the maps of all
// windows is allocated, and no window is copied out of the map.
#pragma once

#include <cstdint>

#include "../common/cells.h"
#include "../common/dtype.h"
#include "../common/status.h"

namespace lpmflow {

struct WindowShape {
  int64_t batch, height, width, heads, head_width, window, shift;
  double scale;
  Dtype dtype;
  int threads;
};

struct WindowForward {
  WindowShape shape;
  Cells qkv;          // dtype
  const void* table;  // ((2 window - 1)^2, heads) contiguous, float32 (float64 for float64)
  void* out;          // (B, height, width, C) contiguous, dtype
};

// With dP[i, j] = grad_out[i] . v[j] and dS = P (dP - sum over j of P dP):
//   grad_q[i] = scale sum over j of dS[i, j] k[j]        grad_k[j] = scale sum over i of dS[i, j] q[i]
//   grad_v[j] = sum over i of P[i, j] grad_out[i]        grad_table[o, h] = sum over offset(i, j) = o of dS[h, i, j]
// P is computed anew. The result does not depend on the number of threads.
struct WindowBackward {
  WindowShape shape;
  Cells qkv;          // dtype
  Cells grad_out;     // dtype
  const void* table;  // as above
  void* grad_qkv;     // (B, height, width, 3 C) contiguous, dtype
  void* grad_table;   // ((2 window - 1)^2, heads) contiguous, float32 (float64 for float64)
};

}  // namespace lpmflow
