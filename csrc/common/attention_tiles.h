// How the CUDA attention kernels cut logits into tiles, and the online softmax; for host and device, to be tested without a
// GPU.
//
// A tile of logits is some query rows times some keys. The warps of a block own whole rows of it, so a row's maximum and
// sum need no shared memory: it lies in kLanesPerRow lanes of one warp. Lane l holds of its warp's part the elements
//   x[i][j] at row Tile::row(l, i) and column Tile::column(l, j),  i < kThreadRows, j < columns / kLanesPerRow
// and the same map serves the attended values, whose columns are the head's width instead of keys.
#pragma once

#include <cmath>
#include <cstdint>

#include "hostdevice.h"

namespace lpmflow {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;

struct Cell {
  int row, column;
};

// 16-bit types: 16 x 8 accumulators of mma.m16n8k16, kRowTiles below one another in a warp. Thread rows 2 t and 2 t + 1
// belong to accumulator row tile t, columns 2 c and 2 c + 1 to column tile c.
template <int kRowTiles_, int kKeys_ = 64>
struct TensorCoreTile {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kLanesPerRow = 4;
  static constexpr int kThreadRows = 2 * kRowTiles;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kKeys = kKeys_;

  static LPMFLOW_HOST_DEVICE int row(int lane, int i) { return 16 * (i / 2) + 8 * (i % 2) + lane / 4; }
  static LPMFLOW_HOST_DEVICE int column(int lane, int j) { return 8 * (j / 2) + 2 * (lane % 4) + j % 2; }
};

// float32: a lane is a key (and every 32nd column of the values) for eight rows.
struct FmaTile {
  static constexpr int kLanesPerRow = 32;
  static constexpr int kThreadRows = 8;
  static constexpr int kWarpRows = 8;
  static constexpr int kKeys = 32;

  static LPMFLOW_HOST_DEVICE int row(int, int i) { return i; }
  static LPMFLOW_HOST_DEVICE int column(int lane, int j) { return 32 * j + lane; }
};

// Rows of a shared tile of `columns` elements are this far apart: 16 bytes more than their length (itself a multiple of
// 32 bytes), so that the same 16 bytes of eight consecutive rows lie in different banks.
template <class T>
LPMFLOW_HOST_DEVICE constexpr int shared_stride(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

// Which 8 elements of a shared tile lane l addresses when ldmatrix loads mma operands.
//   queries (a, 16 queries x 16 of the width):       rows are queries, columns the width
//   keys (b of two column tiles, 16 keys x 16):      rows are keys, columns the width
//   values (b of two column tiles, transposed load): rows are keys, columns the width; 16 keys x 16 of the width
LPMFLOW_HOST_DEVICE Cell query_operand(int lane) { return {lane % 16, lane / 16 * 8}; }
LPMFLOW_HOST_DEVICE Cell key_operand(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }
LPMFLOW_HOST_DEVICE Cell value_operand(int lane) { return {lane % 16, lane / 16 * 8}; }

LPMFLOW_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows (or keys, or columns) of a tile that exist, of `left` from its first to the last.
LPMFLOW_HOST_DEVICE int present(int64_t left, int tile) {
  return left < 0 ? 0 : left < tile ? static_cast<int>(left) : tile;
}

// Work of a block of a kernel that attends: all keys against the queries from `row` on of head `head` = b H + h.
struct AttendWork {
  int64_t head, row;
};

LPMFLOW_HOST_DEVICE int64_t attend_blocks(int64_t heads, int64_t n, int rows) { return heads * ceil_div(n, rows); }
LPMFLOW_HOST_DEVICE AttendWork attend_work(int64_t block, int64_t n, int rows) {
  const int64_t tiles = ceil_div(n, rows);
  return {block / tiles, block % tiles * rows};
}

// Online softmax of a row: after each tile, max is that of the logits seen and sum = sum of e^(x - shift(max)).
//
// NaN needs no care in max (fmaxf drops it): a NaN logit makes its own weight NaN, and with it the sum and all that is
// divided by it. The same holds for +inf, as inf - inf. A row of only -inf ends with sum 0: 0 / 0 is NaN, like softmax.
//
// Where nothing but -inf has been seen the shift is 0, as -inf - -inf would spoil a row whose finite logits come later.
LPMFLOW_HOST_DEVICE float shift(float max) { return max == -INFINITY ? 0.0f : max; }

// What sums over earlier tiles are worth when the maximum has become `max`: e^(exponent).
LPMFLOW_HOST_DEVICE float rescale_exponent(float old_max, float max) { return old_max - shift(max); }

}  // namespace lpmflow
