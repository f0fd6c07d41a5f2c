// cross_scale_fusion on a CUDA device, forward. The contract is in cross_scale_fusion_cuda.h, the interpolation and the
// cutting into blocks in cross_scale_fusion_cells.h.
//
//   for each output source cell, a warp: row = the blend of its up to four coarse rows, into shared memory
//     for each output target cell (a lane every 32nd column, line by line): u from four values of the row
//     sweep 1: largest = max u                    sweep 2: p = e^((u - largest) / temperature), sums of p, p x, p y
//
// u is formed twice rather than kept, and an online softmax, which would need one sweep, would take two exponentials a
// value: exponentials are the scarcer. One launch for all scales: compiled without interpolation a thread takes 40
// registers and with it 48 to 64, too little a difference for a launch a scale. Rows that shared memory has no room for
// are blended anew for each value. Written and compiled without a GPU and run only in emulation: nothing here has been
// timed.
#include "cross_scale_fusion_cuda.h"

#include "../common/device.cuh"
#include "../common/on_device.cuh"
#include "cross_scale_fusion_cells.h"

namespace lpmflow {
namespace {

constexpr int kLanes = 32;

// The blend of four rows of corr, where they lie in memory.
template <class T>
struct BlendedRow {
  const T *above_left, *above_right, *below_left, *below_right;
  float right, down;
  bool whole;  // the source side is not interpolated

  __device__ __forceinline__ float operator[](int k) const {
    if (whole) return widen(above_left[k]);
    return between(between(widen(above_left[k]), widen(above_right[k]), right),
                   between(widen(below_left[k]), widen(below_right[k]), right), down);
  }
};

// u of one column of output target cells, line after line; two neighbouring coarse lines are kept at that column.
template <class Row>
class Column {
 public:
  __device__ __forceinline__ Column(const Row& row, const Axis& lines, const Axis& columns, int j)
      : row_(row), lines_(lines), width_(columns.in), tap_(columns.at(j)) {}

  __device__ __forceinline__ float operator()(int i) {
    const Tap line = lines_.at(i);
    if (line.low != low_) {
      low_ = line.low;
      above_ = at(line.low);
      below_ = at(line.high);
    }
    return between(above_, below_, line.share);
  }

 private:
  __device__ __forceinline__ float at(int line) const {
    return between(row_[line * width_ + tap_.low], row_[line * width_ + tap_.high], tap_.share);
  }

  const Row& row_;
  const Axis& lines_;
  const int width_;
  const Tap tap_;
  int low_ = -1;
  float above_ = 0.0f, below_ = 0.0f;
};

// The same where the target side is not interpolated.
template <class Row>
class WholeColumn {
 public:
  __device__ __forceinline__ WholeColumn(const Row& row, const Axis&, const Axis& columns, int j)
      : row_(row), width_(columns.in), j_(j) {}
  __device__ __forceinline__ float operator()(int i) const { return row_[i * width_ + j_]; }

 private:
  const Row& row_;
  const int width_, j_;
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// A NaN in u may be lost to the maximum, but not to the sum, and through the sum it reaches all results. The same holds
// for a row of nothing but -inf, as -inf - -inf.
template <template <class> class ColumnOf, class Row>
__device__ __forceinline__ void fuse(const FusionCudaArgs& args, const FusionScale& scale, const Row& row,
                                     int64_t first, int64_t at) {
  const int lane = threadIdx.x % kLanes;
  const Axis lines(scale.ht, args.h), columns(scale.wt, args.w);
  float largest = -INFINITY;
  for (int j = lane; j < columns.out; j += kLanes) {
    ColumnOf<Row> u(row, lines, columns, j);
    for (int i = 0; i < lines.out; ++i) largest = fmaxf(largest, u(i));
  }
  largest = warp_max(largest);
  float total = 0.0f, total_x = 0.0f, total_y = 0.0f;
  for (int j = lane; j < columns.out; j += kLanes) {
    ColumnOf<Row> u(row, lines, columns, j);
    float sum = 0.0f;
    for (int i = 0; i < lines.out; ++i) {
      const float p = exp2_approximate((u(i) - largest) * args.exponent);
      sum += p;
      total_y = fmaf(p, args.y[i], total_y);
    }
    total += sum;
    total_x = fmaf(sum, args.x[j], total_x);
  }
  total = warp_sum(total);
  total_x = warp_sum(total_x);
  total_y = warp_sum(total_y);
  if (lane != 0) return;
  const int64_t cells = args.rows * args.w;
  const float inverse = 1.0f / total;
  args.mapping[2 * first + at] = total_x * inverse;
  args.mapping[2 * first + cells + at] = total_y * inverse;
  args.confidence[first + at] = inverse;
  args.largest[first + at] = largest;
}

template <class Row>
__device__ __forceinline__ void fuse_row(const FusionCudaArgs& args, const FusionScale& scale, const Row& row,
                                         int64_t first, int64_t at) {
  if (scale.ht == args.h && scale.wt == args.w) {
    fuse<WholeColumn>(args, scale, row, first, at);
  } else {
    fuse<Column>(args, scale, row, first, at);
  }
}

// A block is blocks.warps() warps, each with an output source cell of its own.
template <class T, bool kStaged>
__global__ void __launch_bounds__(FusionBlocks::kMostWarps* kLanes, 8)
    fuse_kernel(const FusionCudaArgs args, const FusionBlocks blocks) {
  const int lane = threadIdx.x % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t cells = args.rows * args.w;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blocks.warps() + warp;
  if (index >= args.count * args.batch * cells) return;  // a whole warp; none waits for another
  const FusionCell cell = fusion_cell(index, args.batch, args.rows, args.w);
  const FusionScale& scale = args.scale[cell.s];
  const Tap line = Axis(scale.hs, args.h).at(static_cast<int>(args.first_row + cell.r));
  const Tap column = Axis(scale.ws, args.w).at(static_cast<int>(cell.c));
  const T* const corr = static_cast<const T*>(scale.corr) + cell.b * scale.batch;
  const auto coarse_row = [&](int l, int k) { return corr + ((l - scale.first_line) * scale.ws + k) * scale.row; };
  const BlendedRow<T> row{coarse_row(line.low, column.low),
                          coarse_row(line.low, column.high),
                          coarse_row(line.high, column.low),
                          coarse_row(line.high, column.high),
                          column.share,
                          line.share,
                          scale.hs == args.h && scale.ws == args.w};
  const int64_t first = (cell.b * args.scales + args.first_scale + cell.s) * cells, at = cell.r * args.w + cell.c;
  if constexpr (kStaged) {
    float* const values = shared_memory<float>() + warp * blocks.row;
    const int size = static_cast<int>(scale.ht * scale.wt);
    for (int k = lane; k < size; k += kLanes) values[k] = row[k];
    __syncwarp();
    fuse_row(args, scale, values, first, at);
  } else {
    fuse_row(args, scale, row, first, at);
  }
}

template <class T>
cudaError_t forward(const FusionCudaArgs& args, int device, cudaStream_t stream) {
  FusionBlocks blocks{1};
  for (int64_t s = 0; s < args.count; ++s) {
    const int64_t size = args.scale[s].ht * args.scale[s].wt;
    blocks.row = size > blocks.row ? size : blocks.row;
  }
  const int warps = blocks.warps();
  const int64_t count = (args.count * args.batch * args.rows * args.w + warps - 1) / warps;
  const int shared = static_cast<int>(sizeof(float)) * warps * static_cast<int>(blocks.staged() ? blocks.row : 0);
  return blocks.staged() ? launch<fuse_kernel<T, true>>(count, warps * kLanes, shared, device, stream, args, blocks)
                         : launch<fuse_kernel<T, false>>(count, warps * kLanes, shared, device, stream, args, blocks);
}

}  // namespace

int cross_scale_fusion_forward_cuda(const FusionCudaArgs& args, int device, void* stream) {
  if (args.batch == 0 || args.rows == 0 || args.count == 0) return cudaSuccess;
  bool valid = args.count <= kMostScales && args.w >= 1 && args.h * args.w <= INT32_MAX;
  for (int64_t s = 0; valid && s < args.count; ++s) {
    const FusionScale& scale = args.scale[s];
    valid = scale.hs >= 1 && scale.ws >= 1 && scale.ht >= 1 && scale.wt >= 1 && scale.hs * scale.ws <= INT32_MAX &&
            scale.ht * scale.wt <= INT32_MAX;
  }
  if (!valid) return cudaErrorInvalidValue;
  for (int64_t s = 0; s < args.count; ++s) {
    if (!lines_fit(args.scale[s], args.h, args.w, args.first_row, args.rows)) return -kOtherLines;
  }
  return on_device(args.dtype, device, stream, [&](auto element, cudaStream_t on) {
    return forward<decltype(element)>(args, device, on);
  });
}

}  // namespace lpmflow
