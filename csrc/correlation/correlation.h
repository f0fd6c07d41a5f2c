// correlation: cross-attention that also returns its maps, summed over the heads. The CPU contract.
//
//   P[b, h, i, j] = exp(scale q[b, h, i] . k[b, h, j]) / sum over j' of the same
//   attended[b, h, i] = sum over j of P[b, h, i, j] v[b, h, j]
//   corr[b, i - prefix, j - prefix] = sum over h of P[b, h, i, j]          for i, j >= prefix
//
// q is (B, H, N, D), k and v are (B, H, M, D), N, M >= max(prefix, 1), D >= 1, all of element type `dtype`. Sums are
// formed in float32 (float64 for float64). Nothing of size B H N M is allocated.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/rows.h"
#include "../common/status.h"

namespace lpmflow {

struct CorrelationShape {
  int64_t batch, heads, n, m, width, prefix;
  double scale;
  Dtype dtype;
  int threads;
};

struct CorrelationForward {
  CorrelationShape shape;
  Rows q, k, v;
  void* attended;  // (B, H, N, D) contiguous, dtype
  void* corr;      // (B, N - prefix, M - prefix) contiguous, float32 (float64 for float64)
};

// With dP[i, j] = grad_attended[i] . v[j] + grad_corr[i - prefix, j - prefix] and dS = P (dP - sum over j of P dP):
//   grad_q[i] = scale sum over j of dS[i, j] k[j]
//   grad_k[j] = scale sum over i of dS[i, j] q[i]
//   grad_v[j] = sum over i of P[i, j] grad_attended[i]
// P is computed anew. Deterministic for a given number of threads.
struct CorrelationBackward {
  CorrelationShape shape;
  Rows q, k, v;
  Rows grad_attended;       // dtype; absent when nothing depends on `attended`
  const void* grad_corr;    // float32 (float64 for float64), last dimension dense; null when nothing depends on it
  int64_t grad_corr_batch, grad_corr_row;  // strides in elements
  void* grad_q;             // (B, H, N, D) contiguous, dtype
  void* grad_k;             // (B, H, M, D) contiguous, dtype
  void* grad_v;             // (B, H, M, D) contiguous, dtype
};

}  // namespace lpmflow
