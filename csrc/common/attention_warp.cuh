// What a warp does with the tiles of the CUDA attention kernels: on tensor cores for the 16-bit types, by fused
// multiply-adds for float32. TensorCoreMath and FmaMath have the same members, so that the kernels are written once:
//
//   multiply_logits<kWidth>(s, q, k, lane): s += q k^T; q points to the warp's first row; shared tiles kWidth wide
//   multiply_values<kWidth>(o, p, v, lane): o += p v
//   exponential(x): e^x for x <= 0
//   store(to, row, factor, width, lane): a row of this lane, times factor, to the `width` elements from `to` on
//
// s, p and o are this lane's part of a tile, in the map of the Tile they derive from.
#pragma once

#include <cstdint>

#include "attention_tiles.h"
#include "device.cuh"

namespace lpmflow {

template <class T, int kRowTiles, int kTileKeys = 64>
struct TensorCoreMath : TensorCoreTile<kRowTiles, kTileKeys> {
  using Tile = TensorCoreTile<kRowTiles, kTileKeys>;
  static constexpr int kLogits = Tile::kKeys / Tile::kLanesPerRow;

  template <int kWidth>
  static __device__ __forceinline__ void multiply_logits(float (&s)[Tile::kThreadRows][kLogits], const T* q,
                                                         const T* k, int lane) {
    constexpr int kStride = shared_stride<T>(kWidth);
    const Cell at_q = query_operand(lane), at_k = key_operand(lane);
    q += at_q.row * kStride + at_q.column;
    k += at_k.row * kStride + at_k.column;
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) load_matrices(a[t], q + 16 * t * kStride + d);
#pragma unroll
      for (int c = 0; c < kLogits / 4; ++c) {
        uint32_t b[4];
        load_matrices(b, k + 16 * c * kStride + d);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) multiply_pair(s[2 * t], s[2 * t + 1], 4 * c, a[t], b);
      }
    }
  }

  // The weights stay where they are: two accumulator column tiles of 8 keys are an operand of 16 keys.
  template <int kWidth>
  static __device__ __forceinline__ void multiply_values(float (&o)[Tile::kThreadRows][kWidth / Tile::kLanesPerRow],
                                                         const float (&p)[Tile::kThreadRows][kLogits], const T* v,
                                                         int lane) {
    constexpr int kStride = shared_stride<T>(kWidth);
    const Cell at_v = value_operand(lane);
    v += at_v.row * kStride + at_v.column;
#pragma unroll
    for (int key = 0; key < Tile::kKeys; key += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float(&row)[kLogits] = p[2 * t + x % 2];
          a[t][x] = pack<T>(row[key / 4 + x / 2 * 2], row[key / 4 + x / 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int c = 0; c < kWidth / 16; ++c) {
        uint32_t b[4];
        load_matrices_transposed(b, v + key * kStride + 16 * c);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) multiply_pair(o[2 * t], o[2 * t + 1], 4 * c, a[t], b);
      }
    }
  }

  // ex2.approx errs by a relative 2^-22, and so does the rounding of x log2(e) near x = -4: far below the 2^-11 and
  // 2^-8 of the types, and as good as float32's own rounding of the logits.
  static __device__ __forceinline__ float exponential(float x) { return exp2_approximate(x * 1.44269504088896341f); }

  template <int kColumns>
  static __device__ __forceinline__ void store(T* to, const float (&row)[kColumns], float factor, int width, int lane) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      const int column = Tile::column(lane, j);
      const uint32_t both = pack<T>(row[j] * factor, row[j + 1] * factor);
      if (width % 2 == 0) {
        if (column < width) *reinterpret_cast<uint32_t*>(to + column) = both;
      } else {
        if (column < width) to[column].bits = static_cast<uint16_t>(both);
        if (column + 1 < width) to[column + 1].bits = static_cast<uint16_t>(both >> 16);
      }
    }
  }

 private:
  // Two accumulators side by side: rows `upper` and `lower` of this lane, columns j to j + 3.
  template <int kColumns>
  static __device__ __forceinline__ void multiply_pair(float (&upper)[kColumns], float (&lower)[kColumns], int j,
                                                       const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    multiply_add<T>(upper[j], upper[j + 1], lower[j], lower[j + 1], a, b[0], b[1]);
    multiply_add<T>(upper[j + 2], upper[j + 3], lower[j + 2], lower[j + 3], a, b[2], b[3]);
  }
};

struct FmaMath : FmaTile {
  static constexpr int kLogits = kKeys / kLanesPerRow;

  template <int kWidth>
  static __device__ __forceinline__ void multiply_logits(float (&s)[kThreadRows][kLogits], const float* q,
                                                         const float* k, int lane) {
    constexpr int kStride = shared_stride<float>(kWidth);
    k += lane * kStride;
#pragma unroll 2
    for (int d = 0; d < kWidth; d += 4) {
      const Float4 b = *reinterpret_cast<const Float4*>(k + d);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const Float4 a = *reinterpret_cast<const Float4*>(q + i * kStride + d);
#pragma unroll
        for (int x = 0; x < 4; ++x) s[i][0] = fmaf(a.x[x], b.x[x], s[i][0]);
      }
    }
  }

  template <int kWidth>
  static __device__ __forceinline__ void multiply_values(float (&o)[kThreadRows][kWidth / kLanesPerRow],
                                                         const float (&p)[kThreadRows][kLogits], const float* v,
                                                         int lane) {
    constexpr int kStride = shared_stride<float>(kWidth);
#pragma unroll 2
    for (int key = 0; key < kKeys; ++key) {
      float weight[kThreadRows];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) weight[i] = __shfl_sync(0xffffffffu, p[i][0], key);
#pragma unroll
      for (int j = 0; j < kWidth / kLanesPerRow; ++j) {
        const float x = v[key * kStride + column(lane, j)];
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) o[i][j] = fmaf(weight[i], x, o[i][j]);
      }
    }
  }

  static __device__ __forceinline__ float exponential(float x) { return expf(x); }

  template <int kColumns>
  static __device__ __forceinline__ void store(float* to, const float (&row)[kColumns], float factor, int width,
                                               int lane) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (column(lane, j) < width) to[column(lane, j)] = row[j] * factor;
    }
  }
};

}  // namespace lpmflow
