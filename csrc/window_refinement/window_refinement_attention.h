// Attention of a few heads inside one window, forward and backward: what the tasks of this folder's kernels do.
//
// A window is cut into tiles of as many queries as a vector has lanes. For one tile all logits are formed, keys x lanes,
// with the bias as what the sums start from; the softmax runs down the keys; the values are summed likewise. A tile's
// logits stay in the first cache, and nothing else is kept. In small windows heads are done together, step by step:
// there is too little to do for one of them between two steps.
#pragma once

#include "../cpu/buffer.h"
#include "../cpu/element.h"
#include "../cpu/strip.h"
#include "window_refinement_tiles.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

// A map of `In`: its first cell's element, and the distance to the next cell down and to the right.
template <class In>
struct Grid {
  In* data;
  int64_t row, cell;

  Grid operator+(int64_t elements) const { return {data + elements, row, cell}; }
  In* at(int64_t r, int64_t c) const { return data + r * row + c * cell; }
};

// Which lanes of a window's tiles hold a cell of it, for a window of the size last set.
template <class T>
class WindowLanes {
 public:
  using Bits = typename Simd<T>::Bits;
  static constexpr int64_t kLanes = Simd<T>::kLanes;

  explicit WindowLanes(const WindowTiling<T>& tiling)
      : tiling_(tiling), cells_(2 * tiling.tiles() * kLanes), used_(tiling.tiles()) {}

  bool failed() const { return cells_.failed() || used_.failed(); }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t cells() const { return rows_ * columns_; }

  void resize(int64_t rows, int64_t columns) {
    if (rows == rows_ && columns == columns_) return;
    rows_ = rows;
    columns_ = columns;
    for (int64_t tile = 0; tile < tiling_.tiles(); ++tile) {
      used_.get()[tile] = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        int64_t* cell = cells_.get() + 2 * (tile * kLanes + lane);
        tiling_.cell(tile, lane, cell[0], cell[1]);
        if (cell[0] < rows && cell[1] < columns) {
          ++used_.get()[tile];
        } else {
          cell[0] = -1;
        }
      }
    }
  }

  int64_t used(int64_t tile) const { return used_.get()[tile]; }

  // All ones in the lanes that hold a cell.
  Bits mask(int64_t tile) const {
    Bits bits;
    for (int64_t lane = 0; lane < kLanes; ++lane) bits[lane] = cells_.get()[2 * (tile * kLanes + lane)] < 0 ? 0 : -1;
    return bits;
  }

  // visit(lane, row, column) for each lane that holds a cell.
  template <class Visit>
  void each(int64_t tile, Visit visit) const {
    const int64_t* cell = cells_.get() + 2 * tile * kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane, cell += 2) {
      if (cell[0] >= 0) visit(lane, cell[0], cell[1]);
    }
  }

 private:
  const WindowTiling<T>& tiling_;
  Buffer<int64_t> cells_, used_;
  int64_t rows_ = -1, columns_ = -1;
};

// Heads done together: as many as the first cache holds the logits, keys, values and queries of.
template <class T>
int64_t heads_together(int64_t cells, int64_t width, int64_t heads) {
  const int64_t bytes = (cells * (Simd<T>::kLanes + 2 * width) + 2 * width * Simd<T>::kLanes) * int64_t(sizeof(T));
  const int64_t fit = (32 << 10) / bytes;
  return fit < 1 ? 1 : fit < heads ? fit : heads;
}

// to[d] = from[d] factor for each of `width` elements. In fours, which compilers make vectors of.
template <class T, class In>
inline void load_cell(const In* from, int64_t width, T factor, T* to) {
  int64_t d = 0;
  for (; d + 4 <= width; d += 4) {
    const T x[4] = {T(from[d]), T(from[d + 1]), T(from[d + 2]), T(from[d + 3])};
    for (int i = 0; i < 4; ++i) to[d + i] = x[i] * factor;
  }
  for (; d < width; ++d) to[d] = T(from[d]) * factor;
}

template <class T, class In>
inline void store_cell(const T* from, int64_t width, In* to) {
  int64_t d = 0;
  for (; d + 4 <= width; d += 4) {
    const T x[4] = {from[d], from[d + 1], from[d + 2], from[d + 3]};
    for (int i = 0; i < 4; ++i) to[d + i] = In(x[i]);
  }
  for (; d < width; ++d) to[d] = In(from[d]);
}

// Heads beside each other in a cell, and where they go: rows of `heads` times `padded` elements, which may be more than
// a head's width. What is between the heads is not touched.
struct HeadRows {
  int64_t heads, width, padded;

  int64_t row() const { return heads * padded; }

  template <class T, class In>
  void load(const In* from, T factor, T* to) const {
    if (width == padded) return load_cell(from, heads * width, factor, to);
    for (int64_t h = 0; h < heads; ++h) load_cell(from + h * width, width, factor, to + h * padded);
  }
  template <class T, class In>
  void store(const T* from, In* to) const {
    if (width == padded) return store_cell(from, heads * width, to);
    for (int64_t h = 0; h < heads; ++h) store_cell(from + h * padded, width, to + h * width);
  }
};

// The queries of a tile, times `scale`: lanes x width in `rows`, the same as width x lanes in `columns`. Empty lanes are
// zero.
template <class T, class In>
void load_queries(const WindowLanes<T>& lanes, int64_t tile, Grid<const In> from, HeadRows heads, T scale, T* rows,
                  T* columns) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  if (lanes.used(tile) < kLanes) {
    for (int64_t i = 0; i < heads.row() * kLanes; ++i) rows[i] = 0;
  }
  lanes.each(tile, [=](int64_t lane, int64_t r, int64_t c) {
    heads.load(from.at(r, c), scale, rows + lane * heads.row());
  });
  for (int64_t h = 0; h < heads.heads; ++h) {
    transpose(kLanes, heads.width, rows + h * heads.padded, heads.row(), columns + h * heads.width * kLanes, kLanes);
  }
}

// The inverse, from `columns`; `rows` is scratch. Empty lanes are not written.
template <class T, class In>
void store_queries(const WindowLanes<T>& lanes, int64_t tile, const T* columns, int64_t width, T* rows, Grid<In> to) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  transpose(width, kLanes, columns, kLanes, rows, width);
  lanes.each(tile, [=](int64_t lane, int64_t r, int64_t c) { store_cell(rows + lane * width, width, to.at(r, c)); });
}

// `width` elements of each cell of the window, densely.
template <class T, class In>
void load_cells(const WindowLanes<T>& lanes, Grid<const In> from, int64_t width, T* to) {
  for (int64_t r = 0; r < lanes.rows(); ++r) {
    for (int64_t c = 0; c < lanes.columns(); ++c, to += width) load_cell(from.at(r, c), width, T(1), to);
  }
}

// rows x lanes, each row times `factor`.
template <class T>
void scale_strip(int64_t rows, typename Simd<T>::Vec factor, T* x) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < rows; ++i) store(x + i * kLanes, load(x + i * kLanes) * factor);
}

// The logits of one tile, keys x lanes. `bias` is that of the head, laid out by `tiling`.
template <class T>
void form_logits(const WindowTiling<T>& tiling, const WindowLanes<T>& lanes, int64_t tile, Matrix<T> keys,
                 const T* query, int64_t width, const T* bias, T* logits) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const bool whole = tiling.keys_follow() && lanes.columns() == tiling.window();
  const int64_t runs = whole ? 1 : lanes.rows(), length = whole ? lanes.cells() : lanes.columns();
  for (int64_t run = 0; run < runs; ++run) {
    const T* first = bias + tiling.row(tile, run, 0) * kLanes;
    multiply_strip<T>(length, width, {keys.data + run * length * keys.row, keys.row, keys.column}, {query, kLanes},
                      {first, tiling.key_step() * kLanes}, {logits + run * length * kLanes, kLanes});
  }
}

// A window's q, k and v, from its first cell and the first of the heads to be done.
template <class In>
struct WindowInputs {
  Grid<const In> q, k, v;
};

template <class In, class T>
class WindowAttention {
 public:
  using Vec = typename Simd<T>::Vec;
  static constexpr int64_t kLanes = Simd<T>::kLanes;

  WindowAttention(const WindowTiling<T>& tiling, int64_t heads, int64_t width, double scale)
      : tiling_(tiling),
        lanes_(tiling),
        width_(width),
        heads_(heads_together<T>(tiling.cells(), width, heads)),
        scale_(scale),
        scratch_(heads_ * (2 * tiling.cells() * width + tiling.cells() * kLanes + (3 * width + 1) * kLanes)) {
    logits_ = scratch_.get();
    query_ = logits_ + heads_ * tiling.cells() * kLanes;
    sums_ = query_ + heads_ * width * kLanes;
    rows_ = sums_ + heads_ * width * kLanes;
    inverse_ = rows_ + heads_ * width * kLanes;
    keys_ = inverse_ + heads_ * kLanes;
    values_ = keys_ + heads_ * tiling.cells() * width;
  }

  bool failed() const { return lanes_.failed() || scratch_.failed(); }
  int64_t heads() const { return heads_; }  // done together

  // `heads` of them, at most heads(). The biases of two heads are rows() vectors apart.
  void run(int64_t rows, int64_t columns, int64_t heads, WindowInputs<In> from, const T* bias, Grid<In> out) {
    lanes_.resize(rows, columns);
    const int64_t cells = lanes_.cells(), width = heads * width_;
    load_cells(lanes_, from.k, width, keys_);
    load_cells(lanes_, from.v, width, values_);
    for (int64_t tile = 0; tile < tiling_.tiles(); ++tile) {
      if (lanes_.used(tile) == 0) continue;
      load_queries(lanes_, tile, from.q, {heads, width_, width_}, scale_, rows_, query_);
      for (int64_t h = 0; h < heads; ++h) {
        form_logits<T>(tiling_, lanes_, tile, {keys_ + h * width_, width, 1}, query_ + h * width_ * kLanes, width_,
                       bias + h * tiling_.rows() * kLanes, logits_ + h * cells * kLanes);
      }
      for (int64_t h = 0; h < heads; ++h) {
        store(inverse_ + h * kLanes, exponentiate_strip<T>(cells, {logits_ + h * cells * kLanes, kLanes}));
      }
      for (int64_t h = 0; h < heads; ++h) {
        T* sums = sums_ + h * width_ * kLanes;
        multiply_strip<T>(width_, cells, {values_ + h * width_, 1, width}, {logits_ + h * cells * kLanes, kLanes},
                          {nullptr, 0}, {sums, kLanes});
        scale_strip<T>(width_, load(inverse_ + h * kLanes), sums);
      }
      store_queries(lanes_, tile, sums_, width, rows_, out);
    }
  }

 private:
  const WindowTiling<T>& tiling_;
  WindowLanes<T> lanes_;
  const int64_t width_, heads_;
  const T scale_;
  Buffer<T> scratch_;
  T *logits_, *query_, *sums_, *rows_, *inverse_, *keys_, *values_;
};

template <class In, class T>
class WindowAttentionBackward {
 public:
  using Vec = typename Simd<T>::Vec;
  static constexpr int64_t kLanes = Simd<T>::kLanes;

  WindowAttentionBackward(const WindowTiling<T>& tiling, int64_t heads, int64_t width, double scale)
      : tiling_(tiling),
        lanes_(tiling),
        width_(width),
        heads_(heads_together<T>(tiling.cells(), 2 * width, heads)),
        padded_((width + kLanes - 1) / kLanes * kLanes),
        row_(heads_ * padded_),
        scale_(scale),
        scratch_(heads_ * (2 * tiling.cells() * (width + kLanes) + 4 * width * kLanes + kLanes) +
                 2 * row_ * (tiling.cells() + kLanes)) {
    p_ = scratch_.get();
    ds_ = p_ + heads_ * tiling.cells() * kLanes;
    query_ = ds_ + heads_ * tiling.cells() * kLanes;
    grad_ = query_ + heads_ * width * kLanes;
    sums_ = grad_ + heads_ * width * kLanes;
    rows_ = sums_ + heads_ * width * kLanes;
    inverse_ = rows_ + heads_ * width * kLanes;
    query_rows_ = inverse_ + heads_ * kLanes;
    grad_rows_ = query_rows_ + row_ * kLanes;
    grad_keys_ = grad_rows_ + row_ * kLanes;
    grad_values_ = grad_keys_ + tiling.cells() * row_;
    keys_ = grad_values_ + tiling.cells() * row_;
    values_ = keys_ + heads_ * tiling.cells() * width;
  }

  bool failed() const { return lanes_.failed() || scratch_.failed(); }
  int64_t heads() const { return heads_; }  // done together

  // grad_bias is laid out as bias and added to; the other gradients are written.
  void run(int64_t rows, int64_t columns, int64_t heads, WindowInputs<In> from, Grid<const In> grad_out, const T* bias,
           Grid<In> grad_q, Grid<In> grad_k, Grid<In> grad_v, T* grad_bias) {
    lanes_.resize(rows, columns);
    const int64_t cells = lanes_.cells(), width = heads * width_, bias_size = tiling_.rows() * kLanes;
    load_cells(lanes_, from.k, width, keys_);
    load_cells(lanes_, from.v, width, values_);
    const HeadRows padded{heads, width_, padded_};
    if (padded_ != width_) {
      for (int64_t i = 0; i < 2 * row_ * kLanes; ++i) query_rows_[i] = 0;  // and grad_rows_ behind it
    }
    bool begun = false;  // grad_keys_ and grad_values_ hold sums
    for (int64_t tile = 0; tile < tiling_.tiles(); ++tile) {
      if (lanes_.used(tile) == 0) continue;
      load_queries(lanes_, tile, from.q, padded, scale_, query_rows_, query_);
      load_queries(lanes_, tile, grad_out, padded, T(1), grad_rows_, grad_);
      for (int64_t h = 0; h < heads; ++h) {
        const Strip<T> p{p_ + h * cells * kLanes, kLanes}, ds{ds_ + h * cells * kLanes, kLanes};
        const int64_t first = h * width_;
        form_logits<T>(tiling_, lanes_, tile, {keys_ + first, width, 1}, query_ + first * kLanes, width_,
                       bias + h * bias_size, p.data);
        multiply_strip<T>(cells, width_, {values_ + first, width, 1}, {grad_ + first * kLanes, kLanes}, {nullptr, 0},
                          ds);
      }
      for (int64_t h = 0; h < heads; ++h) {
        store(inverse_ + h * kLanes, exponentiate_strip<T>(cells, {p_ + h * cells * kLanes, kLanes}));
      }
      for (int64_t h = 0; h < heads; ++h) {
        const Strip<T> p{p_ + h * cells * kLanes, kLanes}, ds{ds_ + h * cells * kLanes, kLanes};
        differentiate_softmax(tile, p, ds, load(inverse_ + h * kLanes));
        add_to_bias(tile, ds, grad_bias + h * bias_size);
        T* sums = sums_ + h * width_ * kLanes;
        multiply_strip<T>(width_, cells, {keys_ + h * width_, 1, width}, {ds.data, kLanes}, {nullptr, 0},
                          {sums, kLanes});
        scale_strip<T>(width_, Vec{} + scale_, sums);
        for (int64_t d = h * padded_; d < (h + 1) * padded_; d += kLanes) {
          const Strip<T> keys{grad_keys_ + d, padded.row()}, values{grad_values_ + d, padded.row()};
          multiply_strip<T>(cells, kLanes, {ds.data, kLanes, 1}, {query_rows_ + d, padded.row()},
                            {begun ? keys.data : nullptr, keys.row}, keys);
          multiply_strip<T>(cells, kLanes, {p.data, kLanes, 1}, {grad_rows_ + d, padded.row()},
                            {begun ? values.data : nullptr, values.row}, values);
        }
      }
      begun = true;
      store_queries(lanes_, tile, sums_, width, rows_, grad_q);
    }
    store_cells(padded, grad_keys_, grad_k);
    store_cells(padded, grad_values_, grad_v);
  }

 private:
  // p: e^(x - max) -> P. ds: grad_out . v -> dS. Empty lanes become zero, whatever stood in them.
  void differentiate_softmax(int64_t tile, Strip<T> p, Strip<T> ds, Vec inverse) const {
    const int64_t cells = lanes_.cells();
    const typename Simd<T>::Bits used = lanes_.mask(tile);
    Vec delta = {};
    for (int64_t j = 0; j < cells; ++j) {
      const Vec x = load(p.at(j)) * inverse;
      store(p.at(j), used ? x : Vec{});
      delta += x * load(ds.at(j));
    }
    for (int64_t j = 0; j < cells; ++j) {
      const Vec x = load(p.at(j)) * (load(ds.at(j)) - delta);
      store(ds.at(j), used ? x : Vec{});
    }
  }

  void add_to_bias(int64_t tile, Strip<T> ds, T* grad_bias) const {
    const T* from = ds.data;
    for (int64_t r = 0; r < lanes_.rows(); ++r) {
      T* to = grad_bias + tiling_.row(tile, r, 0) * kLanes;
      for (int64_t c = 0; c < lanes_.columns(); ++c, to += tiling_.key_step() * kLanes, from += kLanes) {
        store(to, load(to) + load(from));
      }
    }
  }

  void store_cells(HeadRows heads, const T* from, Grid<In> to) const {
    for (int64_t r = 0; r < lanes_.rows(); ++r) {
      for (int64_t c = 0; c < lanes_.columns(); ++c, from += heads.row()) heads.store(from, to.at(r, c));
    }
  }

  const WindowTiling<T>& tiling_;
  WindowLanes<T> lanes_;
  const int64_t width_, heads_, padded_, row_;
  const T scale_;
  Buffer<T> scratch_;
  T *p_, *ds_, *query_, *grad_, *sums_, *rows_, *inverse_, *query_rows_, *grad_rows_, *grad_keys_, *grad_values_;
  T *keys_, *values_;
};

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
