// Attention by a group of warps: a tile of queries against all keys. What the CUDA kernels of several operations share.
//
//   for each tile of keys: S = logits of Q K^T; online softmax; O += e^(S - max) V. At the end O / sum.
//
// What the operations differ in is a Problem, one for each group of a block:
//
//   Index                                an integer type for keys
//   int rows, width                      queries that there are, elements of a row
//   Index keys, last                     keys that there are; where the loop over them ends, the same in all of a block
//   const T* query(int row), key(Index j), value(Index j)        where rows begin; row 0 may be read even if there is none
//   Place query_place(int row), key_place(int column)            what a logit depends on beside q . k
//   void lay_places(Index first, int keys, int tile, const Group&)    key places of a tile, absent ones too, to shared memory
//   float logit(float dot, Place query, Place key)
//   T* output(int row, float max, float sum, bool first_lane)    where a row of the result belongs
#pragma once

#include <cmath>
#include <cstdint>

#include "attention_tiles.h"
#include "attention_warp.cuh"
#include "device.cuh"

namespace lpmflow {

// Warps that work on the same queries and keys, and which of their threads this is.
struct Group {
  int warps, thread;
};

// How many bytes of a row can be copied at once, 16 or 8, so that no copy crosses the row's end: 0, element by element,
// where rows begin or end elsewhere. `size` and `stride` are those of the `axes` before the last, in elements.
inline int piece_bytes(const void* data, const int64_t* stride, const int64_t* size, int axes, int64_t width,
                       int64_t element_bytes) {
  for (int bytes = 16; bytes >= 8; bytes /= 2) {
    bool whole = reinterpret_cast<uintptr_t>(data) % bytes == 0 && width * element_bytes % bytes == 0;
    for (int x = 0; x < axes; ++x) whole = whole && (size[x] <= 1 || stride[x] * element_bytes % bytes == 0);
    if (whole) return bytes;
  }
  return 0;
}

// Begins to copy tile_rows rows of kColumns to shared memory; what lies beyond `rows` and `columns` becomes 0. Every
// thread of the group calls it. By cp.async where `piece` allows, of 8 bytes in the narrowest tile, whose rows are
// short, and else of 16 (code for both would cost registers); otherwise element by element, at once.
template <int kColumns, class T, class RowOf>
__device__ __forceinline__ void copy_tile(T* to, const RowOf& row_of, int tile_rows, int rows, int columns, int piece,
                                          const Group& group) {
  constexpr int kStride = shared_stride<T>(kColumns), kBytes = kColumns == 16 ? 8 : 16;
  if (piece >= kBytes) {
    constexpr int kElements = kBytes / sizeof(T), kPieces = kColumns / kElements;
#pragma unroll 4
    for (int x = group.thread; x < tile_rows * kPieces; x += group.warps * kLanes) {
      const int row = x / kPieces, column = x % kPieces * kElements;
      const bool valid = row < rows && column < columns;
      copy_async<kBytes>(to + row * kStride + column, row_of(valid ? row : 0) + (valid ? column : 0), valid);
    }
  } else {
#pragma unroll 1
    for (int x = group.thread; x < tile_rows * kColumns; x += group.warps * kLanes) {
      const int row = x / kColumns, column = x % kColumns;
      to[row * kStride + column] = row < rows && column < columns ? row_of(row)[column] : T{};
    }
  }
}

template <class Tile>
__device__ __forceinline__ float max_over_row(float x) {
#pragma unroll
  for (int mask = Tile::kLanesPerRow / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

template <class Tile>
__device__ __forceinline__ float sum_over_row(float x) {
#pragma unroll
  for (int mask = Tile::kLanesPerRow / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Shared memory of a group for its queries, a tile of keys and one of values; a multiple of 16.
template <class T, int kWidth, class Tile>
constexpr int tile_bytes(int warps) {
  return (warps * Tile::kWarpRows + 2 * Tile::kKeys) * shared_stride<T>(kWidth) * static_cast<int>(sizeof(T));
}

// The values of a tile travel during its logits and softmax, the keys of the next during the product with the values.
template <class T, int kWidth, class Tile, class Problem>
__device__ __forceinline__ void attend(const Problem& problem, const Group& group, T* q_tile, int piece) {
  using Index = typename Problem::Index;
  constexpr int kKeys = Tile::kKeys, kThreadRows = Tile::kThreadRows, kLogits = Tile::kLogits;
  constexpr int kColumns = kWidth / Tile::kLanesPerRow, kStride = shared_stride<T>(kWidth);
  const int tile_rows = group.warps * Tile::kWarpRows, lane = group.thread % kLanes;
  const int warp_row = group.thread / kLanes * Tile::kWarpRows;
  T* const k_tile = q_tile + tile_rows * kStride;
  T* const v_tile = k_tile + kKeys * kStride;
  const auto copy_keys = [&](Index first) {
    const int keys = present(problem.keys - first, kKeys);
    const Index from = keys > 0 ? first : 0;
    copy_tile<kWidth>(k_tile, [&](int row) { return problem.key(from + row); }, kKeys, keys, problem.width, piece,
                      group);
    problem.lay_places(first, keys, kKeys, group);
    commit_copies();
  };

  copy_tile<kWidth>(q_tile, [&](int row) { return problem.query(row); }, tile_rows, problem.rows, problem.width, piece,
                    group);
  copy_keys(0);
  typename Problem::Place place[kThreadRows];
  float o[kThreadRows][kColumns] = {};
  float max[kThreadRows], sum[kThreadRows];  // of `sum` this lane's part only, until the end
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    place[i] = problem.query_place(warp_row + Tile::row(lane, i));
    max[i] = -INFINITY;
    sum[i] = 0.0f;
  }

#pragma unroll 1
  for (Index first = 0; first < problem.last; first += kKeys) {
    const int keys = present(problem.keys - first, kKeys);
    wait_copies<0>();
    __syncthreads();  // the keys are here, and no warp reads the former values any more
    const Index from = keys > 0 ? first : 0;
    copy_tile<kWidth>(v_tile, [&](int row) { return problem.value(from + row); }, kKeys, keys, problem.width, piece,
                      group);
    commit_copies();
    float p[kThreadRows][kLogits] = {};
    Tile::template multiply_logits<kWidth>(p, q_tile + warp_row * kStride, k_tile, lane);
#pragma unroll
    for (int j = 0; j < kLogits; ++j) {
      const typename Problem::Place key = problem.key_place(Tile::column(lane, j));
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) p[i][j] = problem.logit(p[i][j], place[i], key);
    }
    if (keys < kKeys) {
#pragma unroll
      for (int j = 0; j < kLogits; ++j) {
        const bool absent = Tile::column(lane, j) >= keys;
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) p[i][j] = absent ? -INFINITY : p[i][j];
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      float highest = max[i];
#pragma unroll
      for (int j = 0; j < kLogits; ++j) highest = fmaxf(highest, p[i][j]);
      highest = max_over_row<Tile>(highest);
      const float factor = Tile::exponential(rescale_exponent(max[i], highest)), from = shift(highest);
      max[i] = highest;
      sum[i] *= factor;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) o[i][j] *= factor;
#pragma unroll
      for (int j = 0; j < kLogits; ++j) sum[i] += p[i][j] = Tile::exponential(p[i][j] - from);
    }
    wait_copies<0>();
    __syncthreads();  // the values are here, and no warp reads these keys any more
    if (first + kKeys < problem.last) copy_keys(first + kKeys);
    Tile::template multiply_values<kWidth>(o, p, v_tile, lane);
  }

#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) sum[i] = sum_over_row<Tile>(sum[i]);
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int row = warp_row + Tile::row(lane, i);
    if (row >= problem.rows) continue;
    T* const to = problem.output(row, max[i], sum[i], lane % Tile::kLanesPerRow == 0);
    Tile::store(to, o[i], 1.0f / sum[i], problem.width, lane);
  }
}

}  // namespace lpmflow
