// How a window's queries are cut into vectors, and the bias laid out for them.
#pragma once

#include "../cpu/buffer.h"
#include "../cpu/simd.h"
#include "window_refinement_windows.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

// A window's cells, dealt out to the lanes of `tiles()` vectors. Where a row of the window fills a vector, a tile is a
// part of one row; in narrower windows the cells follow each other row by row. A smaller window at the edge of the map
// is the upper left part of a whole one: lanes without a cell compute what nobody reads.
//
// The bias of one tile and one key is a vector too, so it is laid out once a call as `rows()` vectors a head. Tiles
// that are rows need one for each row offset and key column; others one for each tile and key.
template <class T>
class WindowTiling {
 public:
  static constexpr int64_t kLanes = Simd<T>::kLanes;

  explicit WindowTiling(int64_t window)
      : window_(window), by_row_(window >= kLanes), per_row_((window + kLanes - 1) / kLanes) {}

  int64_t window() const { return window_; }
  int64_t cells() const { return window_ * window_; }
  int64_t tiles() const { return by_row_ ? window_ * per_row_ : (cells() + kLanes - 1) / kLanes; }
  int64_t rows() const { return by_row_ ? (2 * window_ - 1) * window_ * per_row_ : tiles() * cells(); }

  // The window's cell in a lane; its column is `window` or more where there is none.
  void cell(int64_t tile, int64_t lane, int64_t& r, int64_t& c) const {
    if (by_row_) {
      r = tile / per_row_;
      c = tile % per_row_ * kLanes + lane;
    } else {
      r = (tile * kLanes + lane) / window_;
      c = r < window_ ? (tile * kLanes + lane) % window_ : window_;
    }
  }

  // Which of the bias vectors belongs to a tile and the key in row r, column c; that of the next key in the row is
  // `key_step()` further.
  int64_t row(int64_t tile, int64_t r, int64_t c) const {
    if (by_row_) return ((tile / per_row_ - r + window_ - 1) * window_ + c) * per_row_ + tile % per_row_;
    return tile * cells() + r * window_ + c;
  }
  int64_t key_step() const { return by_row_ ? per_row_ : 1; }

  // Whether key rows of full length follow each other in the bias without a gap.
  bool keys_follow() const { return !by_row_; }

  // Calls visit(table row, element of the bias layout) for every pair of query and key offsets that is laid out.
  template <class Visit>
  void each_offset(Visit visit) const {
    const int64_t w = window_, side = 2 * w - 1;
    const int64_t tiles = by_row_ ? per_row_ : this->tiles();
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        int64_t r, c;
        cell(tile, lane, r, c);
        if (c >= w) continue;
        for (int64_t kr = by_row_ ? 1 - w : 0; kr < w; ++kr) {
          const int64_t offset = (r - kr + w - 1) * side + c + w - 1, element = row(tile, kr, 0) * kLanes + lane;
          for (int64_t kc = 0; kc < w; ++kc) visit(offset - kc, element + kc * key_step() * kLanes);
        }
      }
    }
  }

 private:
  int64_t window_;
  bool by_row_;
  int64_t per_row_;
};

// The bias of one head in that layout, from its column of the ((2 window - 1)^2, heads) table.
template <class T>
void lay_out_bias(const WindowTiling<T>& tiling, const T* table, int64_t heads, T* to) {
  for (int64_t i = 0; i < tiling.rows() * tiling.kLanes; ++i) to[i] = 0;
  tiling.each_offset([=](int64_t offset, int64_t element) { to[element] = table[offset * heads]; });
}

// The inverse, for gradients: every element of the layout is added to its table entry.
template <class T>
void gather_bias(const WindowTiling<T>& tiling, const T* from, int64_t heads, T* table) {
  const int64_t side = 2 * tiling.window() - 1;
  for (int64_t i = 0; i < side * side; ++i) table[i * heads] = 0;
  tiling.each_offset([=](int64_t offset, int64_t element) { table[offset * heads] += from[element]; });
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
