// correlation on a CUDA device, forward. The contract is in correlation_cuda.h, tiles and maps in correlation_tiles.h,
// what a warp does with a tile in correlation_warp.cuh.
//
//   attend:  for each (b, h, query tile), key tiles in order: S = scale Q K^T; online softmax; O += e^(S - max) V.
//            Writes attended = O / sum and lse = max + log(sum).
//   sum:     for each (b, query tile, key tile), heads in order: C += e^(scale Q K^T - lse). Writes corr = C, once.
//
// The second kernel computes Q K^T anew rather than keep B H N M probabilities. 16-bit types use the tensor cores by
// mma.sync (sm_80 and newer), float32 plain fused multiply-adds, not TF32. Written and compiled without a GPU and run
// only in emulation: nothing here has been timed, and the tile sizes come from arithmetic.
#include "correlation_cuda.h"

#include "../common/device.cuh"
#include "correlation_tiles.h"
#include "correlation_warp.cuh"

namespace lpmflow {
namespace {

constexpr int kChunk = 32;  // of the width, read at once by the summing kernel: any width with one compiled kernel
constexpr int kStages = 3;  // chunks in shared memory: one in use, two under way; 45 KB for the 16-bit types

// Begins to copy a kRows x kColumns tile to shared memory; what lies beyond `rows` and `columns` becomes 0. Every
// thread of the block calls it. `aligned`: 16 bytes at a time, by cp.async; else element by element, at once.
template <int kRows, int kColumns, class T>
__device__ __forceinline__ void copy_tile(T* to, const T* from, int64_t stride, int rows, int columns, bool aligned) {
  constexpr int kStride = shared_stride<T>(kColumns);
  if (aligned) {
    constexpr int kElements = 16 / sizeof(T), kPieces = kColumns / kElements;
    static_assert(kRows * kPieces % kThreads == 0, "every thread copies equally often");
#pragma unroll 4
    for (int piece = threadIdx.x; piece < kRows * kPieces; piece += kThreads) {
      const int row = piece / kPieces, column = piece % kPieces * kElements;
      const bool valid = row < rows && column < columns;
      copy_async(to + row * kStride + column, valid ? from + row * stride + column : from, valid);
    }
  } else {
#pragma unroll 1
    for (int element = threadIdx.x; element < kRows * kColumns; element += kThreads) {
      const int row = element / kColumns, column = element % kColumns;
      to[row * kStride + column] = row < rows && column < columns ? from[row * stride + column] : T{};
    }
  }
}

// Where row `token` of head (b, h) begins.
template <class T>
__device__ __forceinline__ const T* row_of(const void* data, const int64_t (&stride)[3], int64_t b, int64_t h,
                                           int64_t token) {
  return static_cast<const T*>(data) + b * stride[0] + h * stride[1] + token * stride[2];
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

template <class T, int kWidth>
constexpr int attend_shared_bytes() {
  using Tile = typename Math<T, kWidth>::Attend;
  return (kWarps * Tile::kWarpRows + 2 * Tile::kKeys) * shared_stride<T>(kWidth) * static_cast<int>(sizeof(T));
}

// Attended values and log-sum-exp. A block owns kWarps x kWarpRows queries of one head and goes through the keys;
// blocks of the same head are neighbours. Shared: the queries, one tile of keys, one of values. The values of a tile
// travel during its logits and softmax, the keys of the next during the product with the values.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, Math<T, kWidth>::kAttendBlocks)
    attend_kernel(const CorrelationCudaArgs args, const bool aligned) {
  using Tile = typename Math<T, kWidth>::Attend;
  constexpr int kRows = kWarps * Tile::kWarpRows, kKeys = Tile::kKeys, kThreadRows = Tile::kThreadRows;
  constexpr int kLogits = Tile::kLogits, kColumns = kWidth / Tile::kLanesPerRow, kStride = shared_stride<T>(kWidth);
  T* const q_tile = shared_memory<T>();
  T* const k_tile = q_tile + kRows * kStride;
  T* const v_tile = k_tile + kKeys * kStride;
  const int lane = threadIdx.x % kLanes, warp_row = static_cast<int>(threadIdx.x) / kLanes * Tile::kWarpRows;
  const AttendWork work = attend_work(blockIdx.x, args.n, kRows);
  const int64_t b = work.head / args.heads, h = work.head % args.heads;
  const int width = static_cast<int>(args.width), rows = present(args.n - work.row, kRows);
  const T* const k = row_of<T>(args.k, args.k_stride, b, h, 0);
  const T* const v = row_of<T>(args.v, args.v_stride, b, h, 0);

  copy_tile<kRows, kWidth>(q_tile, row_of<T>(args.q, args.q_stride, b, h, work.row), args.q_stride[2], rows, width,
                           aligned);
  copy_tile<kKeys, kWidth>(k_tile, k, args.k_stride[2], present(args.m, kKeys), width, aligned);
  commit_copies();
  float o[kThreadRows][kColumns] = {};
  float max[kThreadRows], sum[kThreadRows];  // of `sum` this lane's part only, until the end
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) max[i] = -INFINITY, sum[i] = 0.0f;

#pragma unroll 1
  for (int64_t key = 0; key < args.m; key += kKeys) {
    const int keys = present(args.m - key, kKeys);
    wait_copies<0>();
    __syncthreads();  // the keys are here, and no warp reads the former values any more
    copy_tile<kKeys, kWidth>(v_tile, v + key * args.v_stride[2], args.v_stride[2], keys, width, aligned);
    commit_copies();
    float p[kThreadRows][kLogits] = {};
    Tile::template multiply_logits<kWidth>(p, q_tile + warp_row * kStride, k_tile, lane);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLogits; ++j) p[i][j] = logit(p[i][j], args.scale);
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
    if (key + kKeys < args.m) {
      copy_tile<kKeys, kWidth>(k_tile, k + (key + kKeys) * args.k_stride[2], args.k_stride[2],
                               present(args.m - key - kKeys, kKeys), width, aligned);
      commit_copies();
    }
    Tile::template multiply_values<kWidth>(o, p, v_tile, lane);
  }

#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) sum[i] = sum_over_row<Tile>(sum[i]);
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int row = warp_row + Tile::row(lane, i);
    if (row >= rows) continue;
    const int64_t token = work.head * args.n + work.row + row;
    if (lane % Tile::kLanesPerRow == 0) args.lse[token] = log_sum_exp(max[i], sum[i]);
    Tile::store(static_cast<T*>(args.attended) + token * args.width, o[i], 1.0f / sum[i], width, lane);
  }
}

template <class T>
constexpr int sum_shared_bytes() {
  using Tile = typename Math<T, kChunk>::Sum;
  constexpr int kRows = kWarps * Tile::kWarpRows;
  return kStages * (kRows + Tile::kKeys) * shared_stride<T>(kChunk) * static_cast<int>(sizeof(T));
}

// corr. A block owns a tile of kWarps x kWarpRows queries and kKeys keys of one batch element, and goes through the
// heads and, within each, through chunks of the width; these steps are one stream of copies through a ring of kStages.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) sum_kernel(const CorrelationCudaArgs args, const bool aligned) {
  using Tile = typename Math<T, kChunk>::Sum;
  constexpr int kRows = kWarps * Tile::kWarpRows, kKeys = Tile::kKeys, kThreadRows = Tile::kThreadRows;
  constexpr int kLogits = Tile::kLogits, kStride = shared_stride<T>(kChunk), kStage = (kRows + kKeys) * kStride;
  T* const ring = shared_memory<T>();
  const int lane = threadIdx.x % kLanes, warp_row = static_cast<int>(threadIdx.x) / kLanes * Tile::kWarpRows;
  const int64_t corr_rows = args.n - args.prefix, corr_columns = args.m - args.prefix;
  const SumWork work = sum_work(blockIdx.x, corr_rows, corr_columns, kRows, kKeys);
  const int rows = present(corr_rows - work.row, kRows), keys = present(corr_columns - work.column, kKeys);
  const int heads = static_cast<int>(args.heads), width = static_cast<int>(args.width);
  const T* q = row_of<T>(args.q, args.q_stride, work.batch, 0, args.prefix + work.row);
  const T* k = row_of<T>(args.k, args.k_stride, work.batch, 0, args.prefix + work.column);
  const float* lse = args.lse + work.batch * args.heads * args.n + args.prefix + work.row;

  int next_head = 0, next_start = 0, next_stage = 0;
  const auto copy_next = [&] {
    if (next_head < heads) {
      T* const stage = ring + next_stage * kStage;
      copy_tile<kRows, kChunk>(stage, q + next_start, args.q_stride[2], rows, width - next_start, aligned);
      copy_tile<kKeys, kChunk>(stage + kRows * kStride, k + next_start, args.k_stride[2], keys, width - next_start,
                               aligned);
      next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
      next_start += kChunk;
      if (next_start >= width) {
        next_start = 0;
        ++next_head;
        q += args.q_stride[1];
        k += args.k_stride[1];
      }
    }
    commit_copies();  // also when there was nothing to copy: the waits count groups
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) copy_next();

  float corr[kThreadRows][kLogits] = {};
  int stage = 0;
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
    float s[kThreadRows][kLogits] = {};
    float row_lse[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = warp_row + Tile::row(lane, i);
      row_lse[i] = row < rows ? lse[row] : 0.0f;
    }
    lse += args.n;
#pragma unroll 1
    for (int start = 0; start < width; start += kChunk) {
      wait_copies<kStages - 2>();
      __syncthreads();  // this chunk is here, and no warp reads the one before any more, whose place is filled next
      copy_next();
      const T* const chunk = ring + stage * kStage;
      Tile::template multiply_logits<kChunk>(s, chunk + warp_row * kStride, chunk + kRows * kStride, lane);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLogits; ++j) {
        corr[i][j] += Tile::exponential(probability_exponent(logit(s[i][j], args.scale), row_lse[i]));
      }
    }
  }

  float* const to = args.corr + (work.batch * corr_rows + work.row) * corr_columns + work.column;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int row = warp_row + Tile::row(lane, i);
    if (row >= rows) continue;
    float* const to_row = to + row * corr_columns;
    if (kLogits > 1 && corr_columns % 2 == 0) {
#pragma unroll
      for (int j = 0; j + 1 < kLogits; j += 2) {
        const int column = Tile::column(lane, j);
        if (column < keys) *reinterpret_cast<Float2*>(to_row + column) = {{corr[i][j], corr[i][j + 1]}};
      }
    } else {
#pragma unroll
      for (int j = 0; j < kLogits; ++j) {
        if (Tile::column(lane, j) < keys) to_row[Tile::column(lane, j)] = corr[i][j];
      }
    }
  }
}

// Whether every row begins at a multiple of 16 bytes and is whole 16 bytes long.
bool aligned_rows(const void* data, const int64_t (&stride)[3], const int64_t (&size)[3], int64_t width,
                  int64_t element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && width * element_bytes % 16 == 0;
  for (int x = 0; x < 3; ++x) aligned = aligned && (size[x] == 1 || stride[x] * element_bytes % 16 == 0);
  return aligned;
}

template <class T, int kWidth>
cudaError_t launch_attend(const CorrelationCudaArgs& args, bool aligned, int device, cudaStream_t stream) {
  constexpr int kRows = kWarps * Math<T, kWidth>::Attend::kWarpRows;
  constexpr int kShared = attend_shared_bytes<T, kWidth>();
  static_assert(kShared <= 99 * 1024, "the most a block may have on sm_86, sm_89 and sm_120");
  const int64_t blocks = attend_blocks(args.batch * args.heads, args.n, kRows);
  return launch<attend_kernel<T, kWidth>>(blocks, kThreads, kShared, device, stream, args, aligned);
}

template <class T>
cudaError_t forward(const CorrelationCudaArgs& args, int device, cudaStream_t stream) {
  const int64_t queries[] = {args.batch, args.heads, args.n}, keys[] = {args.batch, args.heads, args.m};
  const bool aligned = aligned_rows(args.q, args.q_stride, queries, args.width, sizeof(T)) &&
                       aligned_rows(args.k, args.k_stride, keys, args.width, sizeof(T)) &&
                       aligned_rows(args.v, args.v_stride, keys, args.width, sizeof(T));
  cudaError_t status = args.width <= 32    ? launch_attend<T, 32>(args, aligned, device, stream)
                       : args.width <= 64  ? launch_attend<T, 64>(args, aligned, device, stream)
                       : args.width <= 96  ? launch_attend<T, 96>(args, aligned, device, stream)
                       : args.width <= 128 ? launch_attend<T, 128>(args, aligned, device, stream)
                                           : launch_attend<T, 256>(args, aligned, device, stream);
  if (status != cudaSuccess || args.n <= args.prefix || args.m <= args.prefix) return status;
  using Tile = typename Math<T, kChunk>::Sum;
  constexpr int kRows = kWarps * Tile::kWarpRows;
  static_assert(sum_shared_bytes<T>() <= 48 * 1024, "needs no asking");
  const int64_t blocks = sum_blocks(args.batch, args.n - args.prefix, args.m - args.prefix, kRows, Tile::kKeys);
  return launch<sum_kernel<T>>(blocks, kThreads, sum_shared_bytes<T>(), device, stream, args, aligned);
}

}  // namespace

int correlation_forward_cuda(const CorrelationCudaArgs& args, int device, void* stream) {
  if (args.batch == 0 || args.heads == 0 || args.n == 0) return cudaSuccess;
  if (args.m < 1 || args.width < 1 || args.width > 256 || args.prefix < 0 || args.heads > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return scope.status();
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case Dtype::kFloat32: return forward<float>(args, device, on);
    case Dtype::kFloat16: return forward<Float16>(args, device, on);
    case Dtype::kBFloat16: return forward<BFloat16>(args, device, on);
    case Dtype::kFloat64: break;
  }
  return cudaErrorNotSupported;
}

}  // namespace lpmflow
