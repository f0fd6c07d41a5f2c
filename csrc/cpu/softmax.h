// Row-wise softmax of blocks of logits, and its gradient: what the attention kernels share.
//
// A row has `row_length` elements, a multiple of the vector's, of which the first `columns` count; the rest is whatever
// it was before and 0 afterwards.
#pragma once

#include "simd.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

// In place: each row of logits becomes e^(x - max), and inverse[i] one over its sum.
template <class T>
void exponentiate(T* logits, int64_t rows, int64_t columns, int64_t row_length, T* inverse) {
  using Vec = typename Simd<T>::Vec;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    T* row = logits + i * row_length;
    for (int64_t j = columns; j < row_length; ++j) row[j] = -__builtin_huge_val();
    Vec highest = load(row);
    for (int64_t j = kLanes; j < row_length; j += kLanes) {
      const Vec x = load(row + j);
      highest = x > highest ? x : highest;
    }
    T top = highest[0];
    for (int lane = 1; lane < kLanes; ++lane) top = highest[lane] > top ? highest[lane] : top;
    Vec total = {};
    for (int64_t j = 0; j < row_length; j += kLanes) {
      const Vec e = exp_nonpositive<T>(load(row + j) - top);
      store(row + j, e);
      total += e;
    }
    for (int64_t j = columns; j < row_length; ++j) row[j] = 0;
    inverse[i] = T(1) / sum<T>(total);
  }
}

// One row, p as `exponentiate` left it: p becomes P, and the gradient dP in `ds` becomes dS = P (dP - sum of P dP).
template <class T>
void softmax_backward(T* p, T* ds, int64_t row_length, T inverse) {
  using Vec = typename Simd<T>::Vec;
  constexpr int kLanes = Simd<T>::kLanes;
  Vec total = {};
  for (int64_t j = 0; j < row_length; j += kLanes) {
    const Vec x = load(p + j) * inverse;
    store(p + j, x);
    total += x * load(ds + j);
  }
  const T delta = sum<T>(total);
  for (int64_t j = 0; j < row_length; j += kLanes) store(ds + j, load(p + j) * (load(ds + j) - delta));
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
