// How the CUDA window attention is cut into blocks, and where its rows and biases lie; for host and device.
#pragma once

#ifndef LPMFLOW_ISA
#define LPMFLOW_ISA device
#endif
#include "window_refinement_windows.h"

namespace lpmflow {

// Division of the numbers below 2^12 by one of at most 2^6, by a product: what is rounded up is less than 2^-20 of it.
struct SmallDivisor {
  uint32_t divisor, inverse;

  LPMFLOW_HOST_DEVICE explicit SmallDivisor(int64_t by)
      : divisor(static_cast<uint32_t>(by)), inverse(((1u << 20) + divisor - 1) / divisor) {}
  LPMFLOW_HOST_DEVICE int quotient(int x) const { return static_cast<int>(static_cast<uint32_t>(x) * inverse >> 20); }
  LPMFLOW_HOST_DEVICE int remainder(int x) const { return x - quotient(x) * static_cast<int>(divisor); }
};

// Rows of the bias table: that of a query and a key is the query's place minus the key's.
LPMFLOW_HOST_DEVICE int bias_rows(int window) { return (2 * window - 1) * (2 * window - 1); }
LPMFLOW_HOST_DEVICE int query_bias(int r, int c, int window) {
  return (r + window - 1) * (2 * window - 1) + c + window - 1;
}
LPMFLOW_HOST_DEVICE int key_bias(int r, int c, int window) { return r * (2 * window - 1) + c; }

// A block is four warps, in groups that each do `queries` queries of one head in one window.
struct WindowBlocks {
  static constexpr int kWarpsOfBlock = 4;

  int cells;         // of the largest window
  int warps;         // of a group: as few as hold its queries, a power of two
  int queries;       // of a group
  int64_t tiles;     // groups for one head in one window
  int64_t heads;
  int64_t items;     // groups with something to do

  LPMFLOW_HOST_DEVICE WindowBlocks(const WindowShape& s, int warp_rows) : heads(s.heads) {
    const int64_t down = s.window < s.height ? s.window : s.height, across = s.window < s.width ? s.window : s.width;
    cells = static_cast<int>(down * across);
    warps = 1;
    while (warps < kWarpsOfBlock && warps * warp_rows < cells) warps *= 2;
    queries = warps * warp_rows;
    tiles = (cells + queries - 1) / queries;
    items = LPMFLOW_ISA::WindowGrid(s).count() * heads * tiles;
  }

  LPMFLOW_HOST_DEVICE int groups() const { return kWarpsOfBlock / warps; }
  LPMFLOW_HOST_DEVICE int64_t blocks() const { return (items + groups() - 1) / groups(); }

  // What group `item` does: heads of a window are neighbours, and so are tiles of a head.
  struct Work {
    int64_t window, head;
    int query;
  };
  LPMFLOW_HOST_DEVICE Work work(int64_t item) const {
    return {item / tiles / heads, item / tiles % heads, static_cast<int>(item % tiles) * queries};
  }
};

}  // namespace lpmflow
