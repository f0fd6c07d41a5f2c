// Matrix products one vector wide, and the softmax of such a strip: the lanes are independent of each other.
//
//   C(i, lane) = first(i, lane) + sum over k of A(i, k) B(k, lane)
//
// With queries in the lanes, attention of any head width needs no sums across a vector and no padding of the width:
// the logits are keys x lanes, the softmax runs down the keys, and the results are head width x lanes.
#pragma once

#include "gemm.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

// Sums kept in registers; one more register holds B's vector, and some hold A's entries.
constexpr int kStripRows = LPMFLOW_VECTOR_BYTES == 64 ? 16 : 12;

// `rows` vectors, `row` elements apart.
template <class T>
struct Strip {
  T* data;
  int64_t row;

  T* at(int64_t i) const { return data + i * row; }
};

template <class T, int kRows>
inline void strip_tile(int64_t depth, Matrix<T> a, Strip<const T> b, Strip<const T> first, Strip<T> c) {
  using Vec = typename Simd<T>::Vec;
  Vec sums[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) sums[i] = first.data == nullptr ? Vec{} : load(first.at(i));
  for (int64_t k = 0; k < depth; ++k) {
    const Vec x = load(b.at(k));
    const T* entry = a.data + k * a.column;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sums[i] += entry[i * a.row] * x;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) store(c.at(i), sums[i]);
}

// The last tile has fewer rows; their number becomes a constant here.
template <class T, int kRows = kStripRows - 1>
inline void strip_rest(int64_t rows, int64_t depth, Matrix<T> a, Strip<const T> b, Strip<const T> first, Strip<T> c) {
  if constexpr (kRows >= 1) {
    if (rows == kRows) return strip_tile<T, kRows>(depth, a, b, first, c);
    strip_rest<T, kRows - 1>(rows, depth, a, b, first, c);
  }
}

// Four elements, whatever the instruction set's vectors are.
template <class T>
struct Quad;
template <>
struct Quad<float> {
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Index __attribute__((vector_size(16)));
};
template <>
struct Quad<double> {
  typedef double Vec __attribute__((vector_size(32)));
  typedef int64_t Index __attribute__((vector_size(32)));
};

#if defined(__clang__)
#define LPMFLOW_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define LPMFLOW_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Index{i, j, k, l})
#endif

// to(j, i) = from(i, j), in blocks of four by four; rows are `from_row` and `to_row` elements apart.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  using Vec = typename Quad<T>::Vec;
  using Index [[maybe_unused]] = typename Quad<T>::Index;
  // Known before the loops: of a constant number of rows nothing is left over, and no loop for the rest comes into being.
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t i = 0; i < whole_rows; i += 4) {
    for (int64_t j = 0; j < whole_columns; j += 4) {
      Vec x[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&x[k], from + (i + k) * from_row + j, sizeof(Vec));
      const Vec a = LPMFLOW_SHUFFLE(x[0], x[1], 0, 4, 1, 5), b = LPMFLOW_SHUFFLE(x[0], x[1], 2, 6, 3, 7);
      const Vec c = LPMFLOW_SHUFFLE(x[2], x[3], 0, 4, 1, 5), d = LPMFLOW_SHUFFLE(x[2], x[3], 2, 6, 3, 7);
      x[0] = LPMFLOW_SHUFFLE(a, c, 0, 1, 4, 5);
      x[1] = LPMFLOW_SHUFFLE(a, c, 2, 3, 6, 7);
      x[2] = LPMFLOW_SHUFFLE(b, d, 0, 1, 4, 5);
      x[3] = LPMFLOW_SHUFFLE(b, d, 2, 3, 6, 7);
      for (int k = 0; k < 4; ++k) std::memcpy(to + (j + k) * to_row + i, &x[k], sizeof(Vec));
    }
    for (int64_t j = whole_columns; j < columns; ++j) {
      for (int k = 0; k < 4; ++k) to[j * to_row + i + k] = from[(i + k) * from_row + j];
    }
  }
  for (int64_t i = whole_rows; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
}

// C (rows) = first (rows) + A (rows, depth) B (depth); `first` may be C itself, and without data it is zero.
template <class T>
void multiply_strip(int64_t rows, int64_t depth, Matrix<T> a, Strip<const T> b, Strip<const T> first, Strip<T> c) {
  int64_t i = 0;
  for (; i + kStripRows <= rows; i += kStripRows) {
    strip_tile<T, kStripRows>(depth, {a.data + i * a.row, a.row, a.column}, b, first, {c.at(i), c.row});
    if (first.data != nullptr) first.data = first.at(kStripRows);
  }
  strip_rest<T>(rows - i, depth, {a.data + i * a.row, a.row, a.column}, b, first, {c.at(i), c.row});
}

// Down the rows, lane by lane, in place: each lane holds e^(x - max); returns one over their sum.
template <class T>
typename Simd<T>::Vec exponentiate_strip(int64_t rows, Strip<T> x) {
  using Vec = typename Simd<T>::Vec;
  Vec highest = load(x.at(0));
  for (int64_t i = 1; i < rows; ++i) {
    const Vec other = load(x.at(i));
    highest = other > highest ? other : highest;
  }
  Vec total = {};
  for (int64_t i = 0; i < rows; ++i) {
    const Vec e = exp_nonpositive<T>(load(x.at(i)) - highest);
    store(x.at(i), e);
    total += e;
  }
  return T(1) / total;
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
