// Small matrix products on packed operands: the arithmetic of every CPU kernel here.
//
//   C(i, j) = sum over k of A(i, k) B(k, j)         (or C += ...)
//
// A is read where it lies, with any strides. B and C have their columns in panels of kPanel = two vectors: B is packed
// panel after panel, each panel k-major, so that the inner loop reads it front to back; C is row-major with a row
// length that is a multiple of kPanel. A tile of kTileRows x kPanel sums stays in registers over a stretch of the inner
// loop and is then added to C: a panel's part stays in the nearest cache, and the rounding errors of long sums stay small.
#pragma once

#include "simd.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

constexpr int kTileRows = LPMFLOW_TILE_ROWS;
constexpr int64_t kStretch = 256;

template <class T>
constexpr int kPanel = 2 * Simd<T>::kLanes;

template <class T>
constexpr int64_t padded(int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;  // strides in elements
};

template <class T, int kRows, bool kAdd, bool kNext = false>
inline void multiply_tile(int64_t depth, Matrix<T> a, const T* b, T* c, int64_t c_row) {
  using Vec = typename Simd<T>::Vec;
  constexpr int kLanes = Simd<T>::kLanes;
  Vec sums[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sums[i][0] = sums[i][1] = Vec{};
  }
  const T* entry = a.data;
  for (int64_t k = 0; k < depth; ++k, entry += a.column, b += kPanel<T>) {
    if (kNext) {
      for (int64_t j = 0; j < kPanel<T>; j += 64 / sizeof(T)) __builtin_prefetch(b + depth * kPanel<T> + j);
    }
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const T x = entry[i * a.row];
      sums[i][0] += x * b0;
      sums[i][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    T* row = c + i * c_row;
    store(row, kAdd ? load(row) + sums[i][0] : sums[i][0]);
    store(row + kLanes, kAdd ? load(row + kLanes) + sums[i][1] : sums[i][1]);
  }
}

// The last tile of a block has fewer rows; their number becomes a constant here.
template <class T, bool kAdd, int kRows = kTileRows - 1>
inline void multiply_rest(int64_t rows, int64_t depth, Matrix<T> a, const T* b, T* c, int64_t c_row) {
  if constexpr (kRows >= 1) {
    if (rows == kRows) return multiply_tile<T, kRows, kAdd>(depth, a, b, c, c_row);
    multiply_rest<T, kAdd, kRows - 1>(rows, depth, a, b, c, c_row);
  }
}

// A stretch of one panel of C. The last whole tile asks for what comes next of B, which a cache further out may hold.
template <class T, bool kAdd>
inline void multiply_panel(int64_t rows, int64_t depth, Matrix<T> a, const T* b, T* c, int64_t c_row) {
  int64_t i = 0;
  for (; i + 2 * kTileRows <= rows; i += kTileRows) {
    multiply_tile<T, kTileRows, kAdd>(depth, {a.data + i * a.row, a.row, a.column}, b, c + i * c_row, c_row);
  }
  if (i + kTileRows <= rows) {
    multiply_tile<T, kTileRows, kAdd, true>(depth, {a.data + i * a.row, a.row, a.column}, b, c + i * c_row, c_row);
    i += kTileRows;
  }
  multiply_rest<T, kAdd>(rows - i, depth, {a.data + i * a.row, a.row, a.column}, b, c + i * c_row, c_row);
}

// C (rows, columns) = or += A (rows, depth) B (depth, columns); `columns` is rounded up to whole panels.
template <class T, bool kAdd = false>
void multiply(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, const T* b, T* c, int64_t c_row) {
  for (int64_t column = 0; column < columns; column += kPanel<T>) {
    int64_t first = depth < kStretch ? depth : kStretch;
    multiply_panel<T, kAdd>(rows, first, a, b, c + column, c_row);
    b += first * kPanel<T>;
    while (first < depth) {
      const int64_t count = depth - first < kStretch ? depth - first : kStretch;
      multiply_panel<T, true>(rows, count, {a.data + first * a.column, a.row, a.column}, b, c + column, c_row);
      b += count * kPanel<T>;
      first += count;
    }
  }
}

// How many elements a packed B of this size takes.
template <class T>
constexpr int64_t packed_size(int64_t depth, int64_t columns) {
  return depth * padded<T>(columns);
}

// Packs `rows` rows of `width` elements as B with B(k, j) = row k's element j: for products over the rows.
template <class T, class In>
void pack_rows(const In* from, int64_t from_row, int64_t rows, int64_t width, T* to) {
  for (int64_t first = 0; first < width; first += kPanel<T>, to += rows * kPanel<T>) {
    const int64_t count = width - first < kPanel<T> ? width - first : kPanel<T>;
    for (int64_t k = 0; k < rows; ++k) {
      const In* source = from + k * from_row + first;
      T* target = to + k * kPanel<T>;
      for (int64_t j = 0; j < count; ++j) target[j] = T(source[j]);
      for (int64_t j = count; j < kPanel<T>; ++j) target[j] = 0;
    }
  }
}

// Packs `rows` rows of `width` elements as B with B(k, j) = row j's element k: for products with each row.
template <class T, class In>
void pack_columns(const In* from, int64_t from_row, int64_t rows, int64_t width, T* to) {
  for (int64_t first = 0; first < rows; first += kPanel<T>, to += width * kPanel<T>) {
    const int64_t count = rows - first < kPanel<T> ? rows - first : kPanel<T>;
    for (int64_t j = 0; j < count; ++j) {
      const In* source = from + (first + j) * from_row;
      for (int64_t k = 0; k < width; ++k) to[k * kPanel<T> + j] = T(source[k]);
    }
    for (int64_t j = count; j < kPanel<T>; ++j) {
      for (int64_t k = 0; k < width; ++k) to[k * kPanel<T> + j] = 0;
    }
  }
}

// rows x width elements, times `scale`, densely.
template <class T, class In>
void copy_rows(const In* from, int64_t from_row, int64_t rows, int64_t width, T scale, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) to[i * width + j] = T(from[i * from_row + j]) * scale;
  }
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
