// correlation on a CUDA device, forward. The contract is in correlation_cuda.h, the cutting into blocks in
// correlation_tiles.h; the attention itself is that of ../common/attention.cuh.
//
//   attend:  for each (b, h, query tile), key tiles in order: S = scale Q K^T; online softmax; O += e^(S - max) V.
//            Writes attended = O / sum and lse = max + log(sum).
//   sum:     for each (b, query tile, key tile), heads in order: C += e^(scale Q K^T - lse). Writes corr = C, once.
//
// The second kernel computes Q K^T anew rather than keep B H N M probabilities. 16-bit types use the tensor cores by
// mma.sync (sm_80 and newer), float32 plain fused multiply-adds, not TF32. Written and compiled without a GPU and run
// only in emulation: nothing here has been timed, and the tile sizes come from arithmetic.
#include "correlation_cuda.h"

#include "../common/attention.cuh"
#include "../common/on_device.cuh"
#include "correlation_tiles.h"

namespace lpmflow {
namespace {

constexpr int kChunk = 32;  // of the width, read at once by the summing kernel: any width with one compiled kernel
constexpr int kStages = 3;  // chunks in shared memory: one in use, two under way; 45 KB for the 16-bit types

// The attending kernel for widths up to kWidth, and the summing kernel. 32 query rows a warp, so that what is read of
// keys and values serves two mma; 16 where 32 rows of attended values would not fit in the registers.
// kAttendBlocks: how many blocks are to fit on a multiprocessor; three leave a thread 168 registers, two 255.
template <class T, int kWidth>
struct Math {
  using Attend = TensorCoreMath<T, kWidth <= 96 ? 2 : 1>;
  using Sum = TensorCoreMath<T, 2>;
  static constexpr int kAttendBlocks = kWidth == 32 || kWidth == 128 ? 3 : 2;
};
template <int kWidth>
struct Math<float, kWidth> {
  using Attend = FmaMath;
  using Sum = FmaMath;
  static constexpr int kAttendBlocks = kWidth <= 96 ? 3 : 2;
};

// Where row `token` of head (b, h) begins.
template <class T>
__device__ __forceinline__ const T* row_of(const void* data, const int64_t (&stride)[3], int64_t b, int64_t h,
                                           int64_t token) {
  return static_cast<const T*>(data) + b * stride[0] + h * stride[1] + token * stride[2];
}

// Queries of one head, and what is done with them.
template <class T>
struct CorrelationRows {
  using Index = int64_t;
  struct Place {};

  int rows, width;
  int64_t keys, last;
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  float scale;
  T* attended;
  float* lse;

  __device__ __forceinline__ const T* query(int row) const { return q + row * q_stride; }
  __device__ __forceinline__ const T* key(int64_t j) const { return k + j * k_stride; }
  __device__ __forceinline__ const T* value(int64_t j) const { return v + j * v_stride; }
  __device__ __forceinline__ Place query_place(int) const { return {}; }
  __device__ __forceinline__ Place key_place(int) const { return {}; }
  __device__ __forceinline__ void lay_places(int64_t, int, int, const Group&) const {}
  __device__ __forceinline__ float logit(float dot, Place, Place) const { return lpmflow::logit(dot, scale); }
  __device__ __forceinline__ T* output(int row, float max, float sum, bool first_lane) const {
    if (first_lane) lse[row] = log_sum_exp(max, sum);
    return attended + static_cast<int64_t>(row) * width;
  }
};

// Attended values and log-sum-exp. A block owns kWarps x kWarpRows queries of one head; blocks of the same head are
// neighbours.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, Math<T, kWidth>::kAttendBlocks)
    attend_kernel(const CorrelationCudaArgs args, const int piece) {
  using Tile = typename Math<T, kWidth>::Attend;
  constexpr int kRows = kWarps * Tile::kWarpRows;
  const AttendWork work = attend_work(blockIdx.x, args.n, kRows);
  const int64_t b = work.head / args.heads, h = work.head % args.heads, token = work.head * args.n + work.row;
  const CorrelationRows<T> problem{present(args.n - work.row, kRows),
                                   static_cast<int>(args.width),
                                   args.m,
                                   args.m,
                                   row_of<T>(args.q, args.q_stride, b, h, work.row),
                                   row_of<T>(args.k, args.k_stride, b, h, 0),
                                   row_of<T>(args.v, args.v_stride, b, h, 0),
                                   args.q_stride[2],
                                   args.k_stride[2],
                                   args.v_stride[2],
                                   args.scale,
                                   static_cast<T*>(args.attended) + token * args.width,
                                   args.lse + token};
  const Group group{kWarps, static_cast<int>(threadIdx.x)};
  attend<T, kWidth, Tile>(problem, group, shared_memory<T>(), piece);
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
__global__ void __launch_bounds__(kThreads, 3) sum_kernel(const CorrelationCudaArgs args, const int piece) {
  using Tile = typename Math<T, kChunk>::Sum;
  constexpr int kRows = kWarps * Tile::kWarpRows, kKeys = Tile::kKeys, kThreadRows = Tile::kThreadRows;
  constexpr int kLogits = Tile::kLogits, kStride = shared_stride<T>(kChunk), kStage = (kRows + kKeys) * kStride;
  T* const ring = shared_memory<T>();
  const Group group{kWarps, static_cast<int>(threadIdx.x)};
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
      const T *const from_q = q + next_start, *const from_k = k + next_start;
      copy_tile<kChunk>(stage, [&](int row) { return from_q + row * args.q_stride[2]; }, kRows, rows,
                        width - next_start, piece, group);
      copy_tile<kChunk>(stage + kRows * kStride, [&](int row) { return from_k + row * args.k_stride[2]; },
                        kKeys, keys, width - next_start, piece, group);
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

template <class T, int kWidth>
cudaError_t launch_attend(const CorrelationCudaArgs& args, int piece, int device, cudaStream_t stream) {
  using Tile = typename Math<T, kWidth>::Attend;
  constexpr int kRows = kWarps * Tile::kWarpRows, kShared = tile_bytes<T, kWidth, Tile>(kWarps);
  static_assert(kShared <= kMostShared, "more than a block may have");
  const int64_t blocks = attend_blocks(args.batch * args.heads, args.n, kRows);
  return launch<attend_kernel<T, kWidth>>(blocks, kThreads, kShared, device, stream, args, piece);
}

template <class T>
cudaError_t forward(const CorrelationCudaArgs& args, int device, cudaStream_t stream) {
  const int64_t queries[] = {args.batch, args.heads, args.n}, keys[] = {args.batch, args.heads, args.m};
  const auto piece_of = [&](const void* data, const int64_t* stride, const int64_t* size) {
    return piece_bytes(data, stride, size, 3, args.width, sizeof(T));
  };
  const int of_q = piece_of(args.q, args.q_stride, queries), of_k = piece_of(args.k, args.k_stride, keys);
  const int of_v = piece_of(args.v, args.v_stride, keys), least = of_k < of_v ? of_k : of_v;
  const int piece = of_q < least ? of_q : least;
  cudaError_t status = args.width <= 32    ? launch_attend<T, 32>(args, piece, device, stream)
                       : args.width <= 64  ? launch_attend<T, 64>(args, piece, device, stream)
                       : args.width <= 96  ? launch_attend<T, 96>(args, piece, device, stream)
                       : args.width <= 128 ? launch_attend<T, 128>(args, piece, device, stream)
                                           : launch_attend<T, 256>(args, piece, device, stream);
  if (status != cudaSuccess || args.n <= args.prefix || args.m <= args.prefix) return status;
  using Tile = typename Math<T, kChunk>::Sum;
  constexpr int kRows = kWarps * Tile::kWarpRows;
  static_assert(sum_shared_bytes<T>() <= 48 * 1024, "needs no asking");
  const int64_t blocks = sum_blocks(args.batch, args.n - args.prefix, args.m - args.prefix, kRows, Tile::kKeys);
  return launch<sum_kernel<T>>(blocks, kThreads, sum_shared_bytes<T>(), device, stream, args, piece);
}

}  // namespace

int correlation_forward_cuda(const CorrelationCudaArgs& args, int device, void* stream) {
  if (args.batch == 0 || args.heads == 0 || args.n == 0) return cudaSuccess;
  if (args.m < 1 || args.width < 1 || args.width > 256 || args.prefix < 0 || args.heads > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  return on_device(args.dtype, device, stream, [&](auto element, cudaStream_t on) {
    return forward<decltype(element)>(args, device, on);
  });
}

}  // namespace lpmflow
