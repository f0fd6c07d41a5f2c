// region_attention on a CUDA device, forward. The contract is in region_attention_cuda.h, the places of biases in
// region_attention_places.h; the attention itself is that of ../common/attention.cuh.
//
// A block owns some queries of one head and goes through the keys. A bias is read from the table where it is needed: what
// a warp asks for at a time lies close together, and a head's table in the first cache. 16-bit types use the tensor cores
// by mma.sync (sm_80 and newer), float32 plain fused multiply-adds, not TF32. Written and compiled without a GPU and run
// only in emulation: nothing here has been timed, and the tile sizes come from arithmetic.
#include "region_attention_cuda.h"

#include "../common/attention.cuh"
#include "../common/on_device.cuh"
#include "region_attention_places.h"

namespace lpmflow {
namespace {

// Queries of one head.
template <class T>
struct RegionRows {
  using Index = int;
  using Place = int;

  const RegionCudaArgs& args;
  const RegionPlaces& places;
  int rows, width, keys, last;
  int first;  // token of the tile's first query
  int head;   // b H + h
  const T *q, *k, *v;
  const float* bias;
  int* key_places;

  __device__ __forceinline__ const T* query(int row) const { return q + row * args.q.token; }
  __device__ __forceinline__ const T* key(int j) const { return k + j * args.k.token; }
  __device__ __forceinline__ const T* value(int j) const { return v + j * args.v.token; }
  __device__ __forceinline__ int query_place(int row) const { return row < rows ? places.query(first + row) : -1; }
  __device__ __forceinline__ void lay_places(int from, int present_keys, int tile, const Group& group) const {
    for (int x = group.thread; x < tile; x += group.warps * kLanes) {
      key_places[x] = x < present_keys ? places.key(from + x) : -1;
    }
  }
  __device__ __forceinline__ int key_place(int column) const { return key_places[column]; }
  __device__ __forceinline__ float logit(float dot, int query, int key) const {
    return fmaf(dot, static_cast<float>(args.shape.scale), (query | key) < 0 ? 0.0f : bias[query - key]);
  }
  __device__ __forceinline__ T* output(int row, float max, float sum, bool first_lane) const {
    const int64_t heads = args.shape.heads, token = first + row;
    if (first_lane && args.statistics != nullptr) {
      float* const to = args.statistics + static_cast<int64_t>(head) * keys + token;
      *to = max;
      to[args.shape.batch * heads * keys] = 1.0f / sum;
    }
    return static_cast<T*>(args.attended) + ((head / heads * keys + token) * heads + head % heads) * width;
  }
};

// 32 queries a warp, so that what is read of keys and values serves two mma; 16 where 32 rows of values would not fit in
// the registers. kBlocks: how many blocks are to fit on a multiprocessor; three leave a thread 168 registers, two 255.
template <class T, int kWidth>
struct RegionMath {
  using Tile = TensorCoreMath<T, kWidth <= 64 ? 2 : 1>;
  static constexpr int kBlocks = kWidth <= 64 ? 2 : 3;
};
template <int kWidth>
struct RegionMath<float, kWidth> {
  using Tile = FmaMath;
  static constexpr int kBlocks = 2;
};

template <class T>
__device__ __forceinline__ const T* head_of(const Rows& x, int64_t b, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.batch + h * x.head;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, RegionMath<T, kWidth>::kBlocks)
    region_kernel(const RegionCudaArgs args, const RegionPlaces places, const int piece) {
  using Tile = typename RegionMath<T, kWidth>::Tile;
  constexpr int kRows = kWarps * Tile::kWarpRows;
  const RegionAttentionShape& s = args.shape;
  const int tokens = places.tokens();
  const AttendWork work = attend_work(blockIdx.x, tokens, kRows);
  const int64_t b = work.head / s.heads, h = work.head % s.heads;
  T* const tiles = shared_memory<T>();
  const int64_t columns = static_cast<int64_t>(2 * places.hm - 1) * (2 * places.wm - 1) * 4;
  const RegionRows<T> problem{args,
                              places,
                              present(tokens - work.row, kRows),
                              static_cast<int>(s.width),
                              tokens,
                              tokens,
                              static_cast<int>(work.row),
                              static_cast<int>(work.head),
                              head_of<T>(args.q, b, h) + work.row * args.q.token,
                              head_of<T>(args.k, b, h),
                              head_of<T>(args.v, b, h),
                              args.table + h * columns,
                              reinterpret_cast<int*>(tiles + tile_bytes<T, kWidth, Tile>(kWarps) / sizeof(T))};
  const Group group{kWarps, static_cast<int>(threadIdx.x)};
  attend<T, kWidth, Tile>(problem, group, tiles, piece);
}

template <class T, int kWidth>
cudaError_t launch_region(const RegionCudaArgs& args, int piece, int device, cudaStream_t stream) {
  using Tile = typename RegionMath<T, kWidth>::Tile;
  constexpr int kShared = tile_bytes<T, kWidth, Tile>(kWarps) + 4 * Tile::kKeys;
  static_assert(kShared <= kMostShared, "more than a block may have");
  const RegionPlaces places(args.shape);
  const int64_t blocks =
      attend_blocks(args.shape.batch * args.shape.heads, places.tokens(), kWarps * Tile::kWarpRows);
  return launch<region_kernel<T, kWidth>>(blocks, kThreads, kShared, device, stream, args, places, piece);
}

template <class T>
cudaError_t forward(const RegionCudaArgs& args, int device, cudaStream_t stream) {
  const RegionAttentionShape& s = args.shape;
  const int64_t size[] = {s.batch, s.heads, RegionPlaces(s).tokens()};
  int piece = 16;
  for (const Rows* x : {&args.q, &args.k, &args.v}) {
    const int64_t stride[] = {x->batch, x->head, x->token};
    const int of_x = piece_bytes(x->data, stride, size, 3, s.width, sizeof(T));
    piece = of_x < piece ? of_x : piece;
  }
  return s.width <= 32   ? launch_region<T, 32>(args, piece, device, stream)
         : s.width <= 64 ? launch_region<T, 64>(args, piece, device, stream)
         : s.width <= 96 ? launch_region<T, 96>(args, piece, device, stream)
                         : launch_region<T, 128>(args, piece, device, stream);
}

}  // namespace

int region_attention_forward_cuda(const RegionCudaArgs& args, int device, void* stream) {
  const RegionAttentionShape& s = args.shape;
  if (s.batch == 0 || s.heads == 0) return cudaSuccess;
  const int64_t hm = s.height[0] > s.height[1] ? s.height[0] : s.height[1];
  const int64_t wm = s.across[0] > s.across[1] ? s.across[0] : s.across[1];
  if (s.width < 1 || s.width > kMostRegionWidth || s.prefix < 0 || s.height[0] < 1 || s.height[1] < 1 ||
      s.across[0] < 1 || s.across[1] < 1 || 16 * hm * wm + 2 * s.prefix > INT32_MAX ||
      s.batch * s.heads > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  return on_device(s.dtype, device, stream, [&](auto element, cudaStream_t on) {
    return forward<decltype(element)>(args, device, on);
  });
}

}  // namespace lpmflow
