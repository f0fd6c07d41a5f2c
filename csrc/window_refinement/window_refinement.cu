// Window attention on a CUDA device, forward. The contract is in window_refinement_cuda.h, the cutting into blocks in
// window_refinement_blocks.h; the attention itself is that of ../common/attention.cuh.
//
// A row of q, k or v is read where it lies in the map: its window's first cell, some lines down and some cells across. A
// group of warps keeps its head's column of the bias table in shared memory. 16-bit types use the tensor cores by
// mma.sync (sm_80 and newer), float32 plain fused multiply-adds, not TF32. Written and compiled without a GPU and run
// only in emulation: nothing here has been timed, and the tile sizes come from arithmetic.
#include "window_refinement_cuda.h"

#include "../common/attention.cuh"
#include "../common/on_device.cuh"
#include "window_refinement_blocks.h"

namespace lpmflow {
namespace {

// Queries of one head in one window.
template <class T>
struct WindowRows {
  using Index = int;
  using Place = int;

  const WindowCudaArgs& args;
  int rows, width, keys, last;
  int first;            // query that the tile begins with
  SmallDivisor across;  // columns of the window
  int64_t head, cell;   // the window's first cell is this one of all maps'
  const T* q;           // its query
  const float* bias;
  int* key_places;

  __device__ __forceinline__ int window() const { return static_cast<int>(args.shape.window); }
  __device__ __forceinline__ int64_t channels() const { return args.shape.heads * args.shape.head_width; }
  __device__ __forceinline__ int64_t offset(int at) const {
    const int r = across.quotient(at), c = at - r * static_cast<int>(across.divisor);
    return r * args.qkv.row + c * args.qkv.cell;
  }
  __device__ __forceinline__ const T* query(int row) const { return q + offset(first + row); }
  __device__ __forceinline__ const T* key(int j) const { return q + channels() + offset(j); }
  __device__ __forceinline__ const T* value(int j) const { return q + 2 * channels() + offset(j); }
  __device__ __forceinline__ int query_place(int row) const {
    const int at = row < rows ? first + row : 0;
    return query_bias(across.quotient(at), across.remainder(at), window());
  }
  __device__ __forceinline__ void lay_places(int from, int present_keys, int tile, const Group& group) const {
    for (int x = group.thread; x < tile; x += group.warps * kLanes) {
      const int at = x < present_keys ? from + x : 0;
      key_places[x] = key_bias(across.quotient(at), across.remainder(at), window());
    }
  }
  __device__ __forceinline__ int key_place(int column) const { return key_places[column]; }
  __device__ __forceinline__ float logit(float dot, int query, int key) const {
    return fmaf(dot, static_cast<float>(args.shape.scale), bias[query - key]);
  }
  __device__ __forceinline__ T* output(int row, float, float, bool) const {
    const int64_t at = cell + across.quotient(first + row) * args.shape.width + across.remainder(first + row);
    return static_cast<T*>(args.out) + at * channels() + head * width;
  }
};

// 16 queries a warp, one mma of rows: windows are small, and registers are better spent on more warps. Up to 16 cells, as
// in windows of 4 x 4, 16 keys and so a warp for each head and window.
// kBlocks: how many blocks are to fit on a multiprocessor; four leave a thread 128 registers, three 168, two 255.
template <class T, int kWidth, bool kSmall>
struct WindowMath {
  using Tile = TensorCoreMath<T, 1, kSmall ? 16 : 64>;
  static constexpr int kBlocks = kWidth <= 32 ? 4 : kWidth <= 96 ? 3 : 2;
};
template <int kWidth>
struct WindowMath<float, kWidth, false> {
  using Tile = FmaMath;
  static constexpr int kBlocks = 2;
};

// Shared memory of a group: its tiles, the places of a tile of keys, the biases of its head.
template <class T, int kWidth, class Tile>
LPMFLOW_HOST_DEVICE int group_bytes(int warps, int64_t window) {
  const int floats = Tile::kKeys + bias_rows(static_cast<int>(window));
  return tile_bytes<T, kWidth, Tile>(warps) + (floats + 3) / 4 * 16;
}

template <class T, int kWidth, bool kSmall>
__global__ void __launch_bounds__(kThreads, WindowMath<T, kWidth, kSmall>::kBlocks)
    window_kernel(const WindowCudaArgs args, const WindowBlocks blocks, const int piece) {
  using Tile = typename WindowMath<T, kWidth, kSmall>::Tile;
  const WindowShape& s = args.shape;
  const int threads = blocks.warps * kLanes, number = static_cast<int>(threadIdx.x) / threads;
  const Group group{blocks.warps, static_cast<int>(threadIdx.x) % threads};
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * blocks.groups() + number;
  const bool idle = wanted >= blocks.items;  // it goes through the last item's motions, and has no rows
  const WindowBlocks::Work work = blocks.work(idle ? blocks.items - 1 : wanted);
  const LPMFLOW_ISA::Window at = LPMFLOW_ISA::WindowGrid(s)[work.window];
  const int cells = static_cast<int>(at.rows * at.columns);
  const int rows = idle ? 0 : present(cells - work.query, blocks.queries);
  if (blocks.groups() == 1 && rows == 0) return;  // a window smaller than the largest; nobody else waits here

  unsigned char* const shared = shared_memory<unsigned char>() + number * group_bytes<T, kWidth, Tile>(blocks.warps, s.window);
  int* const key_places = reinterpret_cast<int*>(shared + tile_bytes<T, kWidth, Tile>(blocks.warps));
  float* const bias = reinterpret_cast<float*>(key_places + Tile::kKeys);
  const float* const table = args.table + work.head;
  for (int x = group.thread; x < bias_rows(static_cast<int>(s.window)); x += threads) bias[x] = table[x * s.heads];

  const int width = static_cast<int>(s.head_width);
  const WindowRows<T> problem{args,
                              rows,
                              width,
                              cells,
                              blocks.groups() == 1 ? cells : blocks.cells,
                              rows > 0 ? work.query : 0,
                              SmallDivisor(at.columns),
                              work.head,
                              (at.batch * s.height + at.r) * s.width + at.c,
                              static_cast<const T*>(args.qkv.data) + at.batch * args.qkv.batch + at.r * args.qkv.row +
                                  at.c * args.qkv.cell + work.head * width,
                              bias,
                              key_places};
  attend<T, kWidth, Tile>(problem, group, reinterpret_cast<T*>(shared), piece);
}

template <class T, int kWidth, bool kSmall>
cudaError_t launch_window(const WindowCudaArgs& args, int piece, int device, cudaStream_t stream) {
  using Tile = typename WindowMath<T, kWidth, kSmall>::Tile;
  static_assert(tile_bytes<T, kWidth, Tile>(WindowBlocks::kWarpsOfBlock) + 4 * Tile::kKeys +
                        4 * (2 * kMostWindow - 1) * (2 * kMostWindow - 1) <= kMostShared - 16,
                "more than a block may have");
  const WindowBlocks blocks(args.shape, Tile::kWarpRows);
  const int shared = blocks.groups() * group_bytes<T, kWidth, Tile>(blocks.warps, args.shape.window);
  return launch<window_kernel<T, kWidth, kSmall>>(blocks.blocks(), kThreads, shared, device, stream, args, blocks, piece);
}

template <class T, int kWidth>
cudaError_t by_window(const WindowCudaArgs& args, int piece, int device, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (WindowBlocks(args.shape, 16).cells <= 16) return launch_window<T, kWidth, true>(args, piece, device, stream);
  }
  return launch_window<T, kWidth, false>(args, piece, device, stream);
}

template <class T>
cudaError_t forward(const WindowCudaArgs& args, int device, cudaStream_t stream) {
  const int64_t stride[] = {args.qkv.batch, args.qkv.row, args.qkv.cell};
  const int64_t size[] = {args.shape.batch, args.shape.height, args.shape.width}, width = args.shape.head_width;
  const int piece = piece_bytes(args.qkv.data, stride, size, 3, width, sizeof(T));
  if constexpr (sizeof(T) == 2) {
    if (width <= 16) return by_window<T, 16>(args, piece, device, stream);
  }
  return width <= 32   ? by_window<T, 32>(args, piece, device, stream)
         : width <= 64 ? by_window<T, 64>(args, piece, device, stream)
         : width <= 96 ? by_window<T, 96>(args, piece, device, stream)
                       : by_window<T, 128>(args, piece, device, stream);
}

}  // namespace

int window_refinement_forward_cuda(const WindowCudaArgs& args, int device, void* stream) {
  const WindowShape& s = args.shape;
  if (s.batch == 0 || s.height == 0 || s.width == 0 || s.heads == 0) return cudaSuccess;
  if (s.head_width < 1 || s.head_width > kMostHeadWidth || s.window < 1 || s.window > kMostWindow || s.shift < 0 ||
      s.shift >= s.window) {
    return cudaErrorInvalidValue;
  }
  return on_device(s.dtype, device, stream, [&](auto element, cudaStream_t on) {
    return forward<decltype(element)>(args, device, on);
  });
}

}  // namespace lpmflow
