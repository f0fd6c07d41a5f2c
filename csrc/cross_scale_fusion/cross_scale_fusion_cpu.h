// cross_scale_fusion on the CPU, for the instruction set of the including translation unit.
//
// Forward: a task is one line of output source cells.
// Backward: a task is all output lines between two coarse source lines, to whose gradients it adds. Every second task is
// done first and the others after, so that no two write the same coarse line at once, and each sum has one order.
#pragma once

#include "../cpu/gemm.h"
#include "cross_scale_fusion_row.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

template <class In, class T>
class Fusion {
 public:
  using Vec = typename Simd<T>::Vec;
  static constexpr int kLanes = Simd<T>::kLanes;

  explicit Fusion(const CrossScaleFusion& op) : op_(op), row_(op) {}

  bool failed() const { return row_.failed(); }

  void begin_scale(int64_t s) {
    index_ = s;
    row_.begin_scale(s);
  }

  // Output line `r` of the whole grid.
  void run(int64_t b, int64_t r) {
    for (int64_t c = 0; c < op_.w; ++c) cell(b, r, c);
  }

 private:
  void cell(int64_t b, int64_t r, int64_t c) {
    const T top = row_.template make<true>(b, r, c), exponent = T(kLog2E / op_.temperature);
    const T *u = row_.u(), *y = static_cast<const T*>(op_.y), *valid = row_.valid();
    const int64_t width = row_.width();
    Vec total = {}, by_column = {}, by_line = {};
    for (int64_t j = 0; j < width; j += kLanes) {  // down the lines, so that the sums stay in registers
      Vec column = {}, moment = {};
      for (int64_t i = 0; i < op_.h; ++i) {
        const Vec p = exp2_nonpositive<T>((load(u + i * width + j) - top) * exponent);
        column += p;
        moment += p * y[i];
      }
      column *= load(valid + j);
      total += column;
      by_column += column * load(row_.x() + j);
      by_line += moment * load(valid + j);
    }
    const T inverse = 1 / sum<T>(total);
    const int64_t cells = op_.rows * op_.w, first = (b * op_.scales + index_) * cells;
    const int64_t at = (r - op_.first_row) * op_.w + c;
    static_cast<T*>(op_.mapping)[2 * first + at] = sum<T>(by_column) * inverse;
    static_cast<T*>(op_.mapping)[2 * first + cells + at] = sum<T>(by_line) * inverse;
    static_cast<T*>(op_.confidence)[first + at] = inverse;  // the largest probability is that of u = top
    static_cast<T*>(op_.largest)[first + at] = top;
  }

  const CrossScaleFusion& op_;
  int64_t index_ = 0;
  FusionRow<In, T> row_;
};

// Gradients are gathered as lines of the output width, `ht` of them to a coarse source cell, and brought to the width of
// the target grid when a task, or a cell that is a coarse cell itself, is done with them. Where neither side is
// interpolated they are written where they belong.
template <class In, class T>
class FusionBackward {
 public:
  using Vec = typename Simd<T>::Vec;
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr int kLines = 4;

  explicit FusionBackward(const CrossScaleFusionBackward& back)
      : back_(back), op_(back.op), row_(op_), lines_(most_lines()), tables_(most_tables()), range_(2 * most_height()) {}

  bool failed() const { return row_.failed() || lines_.failed() || tables_.failed() || range_.failed(); }

  void begin_scale(int64_t s) {
    index_ = s;
    row_.begin_scale(s);
    const FusionScale& scale = row_.scale();
    shrunk_ = tables_.get();
    down_ = shrunk_ + scale.ht * padded<T>(scale.wt);
    T* across = down_ + scale.ht * op_.h;
    shrink_ = across + op_.w * scale.wt;
    gathered_ = shrink_ + packed_size<T>(op_.w, scale.wt);
    column_sums_ = gathered_ + scale.ht * row_.width();
    line_sums_ = column_sums_ + row_.width();
    const Axis<T> height(scale.ht, op_.h), width(scale.wt, op_.w);
    for (int64_t x = 0; x < scale.ht * op_.h; ++x) down_[x] = 0;
    for (int64_t i = 0; i < op_.h; ++i) {
      down_[height.low(i) * op_.h + i] += 1 - height.weight(i);
      down_[height.high(i) * op_.h + i] += height.weight(i);
    }
    for (int64_t k = 0; k < scale.ht; ++k) {  // the output lines that line k has a part in are neighbours
      int64_t end = op_.h, from = 0;
      while (from < op_.h && height.high(from) < k) ++from;
      while (end > from && height.low(end - 1) > k) --end;
      range_.get()[2 * k] = from;
      range_.get()[2 * k + 1] = end;
    }
    for (int64_t x = 0; x < op_.w * scale.wt; ++x) across[x] = 0;
    for (int64_t j = 0; j < op_.w; ++j) {
      across[j * scale.wt + width.low(j)] += 1 - width.weight(j);
      across[j * scale.wt + width.high(j)] += width.weight(j);
    }
    pack_rows<T>(across, scale.wt, op_.w, scale.wt, shrink_);
  }

  // The output lines whose upper coarse line is `coarse`: adds to its gradients, to those of the next coarse line, and,
  // where they are wanted, to grad_x (width of the row) and grad_y (h). Without interpolation of the source side: writes
  // those of `coarse`.
  template <bool kTables>
  void run(int64_t b, int64_t coarse, T* grad_x, T* grad_y) {
    const FusionScale& scale = row_.scale();
    const int64_t size = scale.ht * scale.wt, cell_lines = scale.ht * row_.width();
    const int64_t line = coarse - scale.first_line;
    T* grad = static_cast<T*>(scale.grad) + b * scale.lines * scale.ws * size;
    if (kTables) {
      for (int64_t i = 0; i < op_.h; ++i) store(line_sums_ + i * kLanes, Vec{});
    }
    if (row_.whole_source()) {
      const bool in_place = row_.whole_target() && row_.width() == scale.wt;
      for (int64_t c = 0; c < op_.w; ++c) {
        T* to = grad + (line * op_.w + c) * size;
        logits<kTables>(b, coarse, c, in_place ? to : row_.scratch(), grad_x);
        if (!in_place) flush<false>(gather(), to);
      }
      if (kTables) sum_lines(grad_y);
      return;
    }
    const Axis<T> lines(scale.hs, op_.h), columns(scale.ws, op_.w);
    bool any = false;
    for (int64_t r = op_.first_row; r < op_.first_row + op_.rows; ++r) {
      if (lines.low(r) != coarse) continue;
      if (!any) {
        for (int64_t x = 0; x < 2 * scale.ws * cell_lines; ++x) lines_.get()[x] = 0;
      }
      any = true;
      for (int64_t c = 0; c < op_.w; ++c) {
        logits<kTables>(b, r, c, row_.scratch(), grad_x);
        T *left = lines_.get() + columns.low(c) * cell_lines, *right = lines_.get() + columns.high(c) * cell_lines;
        const int64_t below = lines.high(r) > coarse ? scale.ws * cell_lines : 0;
        spread(gather(), left, right, below, columns.weight(c), lines.weight(r));
      }
    }
    if (kTables) sum_lines(grad_y);
    if (!any) return;
    const int64_t below = line + 1 < scale.lines ? line + 1 : line;
    for (int64_t c = 0; c < scale.ws; ++c) {
      flush<true>(lines_.get() + c * cell_lines, grad + (line * scale.ws + c) * size);
      flush<true>(lines_.get() + (scale.ws + c) * cell_lines, grad + (below * scale.ws + c) * size);
    }
  }

 private:
  int64_t most_lines() const {
    int64_t found = 0;
    for (int64_t s = 0; s < op_.scales; ++s) {
      const FusionScale& scale = op_.scale[s];
      const int64_t size = 2 * scale.ws * scale.ht * row_.width();
      found = size > found ? size : found;
    }
    return found;
  }

  int64_t most_height() const {
    int64_t found = 0;
    for (int64_t s = 0; s < op_.scales; ++s) found = op_.scale[s].ht > found ? op_.scale[s].ht : found;
    return found;
  }

  int64_t most_tables() const {
    int64_t found = 0;
    for (int64_t s = 0; s < op_.scales; ++s) {
      const FusionScale& scale = op_.scale[s];
      const int64_t size = scale.ht * padded<T>(scale.wt) + scale.ht * op_.h + op_.w * scale.wt +
                           packed_size<T>(op_.w, scale.wt) + (scale.ht + 1) * row_.width();
      found = size > found ? size : found;
    }
    return found + op_.h * kLanes;
  }

  // What is known of one output source cell before its gradient.
  struct Cell {
    const T* u;
    T* du;
    T top, exponent, inverse, mean_x, mean_y, gx, gy, cold;
  };

  // The gradient of u, (h, width of the row), which may lie in the row's scratch.
  template <bool kTables>
  void logits(int64_t b, int64_t r, int64_t c, T* du, T* grad_x) {
    const int64_t cells = op_.rows * op_.w, first = (b * op_.scales + index_) * cells;
    const int64_t at = (r - op_.first_row) * op_.w + c;
    const T* grad = static_cast<const T*>(back_.grad_mapping) + 2 * first + at;
    const T* mean = static_cast<const T*>(op_.mapping) + 2 * first + at;
    row_.template make<false>(b, r, c);
    const Cell cell{row_.u(),
                    du,
                    static_cast<const T*>(op_.largest)[first + at],
                    T(kLog2E / op_.temperature),
                    static_cast<const T*>(op_.confidence)[first + at],
                    mean[0],
                    mean[cells],
                    grad[0],
                    grad[cells],
                    T(1 / op_.temperature)};
    if (kTables) {
      for (int64_t j = 0; j < row_.width(); ++j) column_sums_[j] = 0;
    }
    int64_t i = 0;
    for (; i + kLines <= op_.h; i += kLines) some_lines<kTables, kLines>(cell, i);
    for (; i < op_.h; ++i) some_lines<kTables, 1>(cell, i);
    if (!kTables) return;
    for (int64_t j = 0; j < row_.width(); j += kLanes) {  // once a cell, for the sake of the last bits of long sums
      store(grad_x + j, load(grad_x + j) + load(column_sums_ + j) * cell.gx);
    }
  }

  // `kCount` lines from `i` on, whose sums stay in registers.
  template <bool kTables, int kCount>
  void some_lines(const Cell& cell, int64_t i) {
    const int64_t width = row_.width();
    const T *u = cell.u + i * width, *y = static_cast<const T*>(op_.y) + i, *x = row_.x(), *valid = row_.valid();
    T *du = cell.du + i * width, push[kCount];
    Vec totals[kCount];
    for (int k = 0; k < kCount; ++k) {
      push[k] = (y[k] - cell.mean_y) * (cell.gy * cell.cold);
      totals[k] = Vec{};
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec pull = (load(x + j) - cell.mean_x) * (cell.gx * cell.cold), scale = load(valid + j) * cell.inverse;
      Vec column = {};
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) {
        const Vec p = exp2_nonpositive<T>((load(u + k * width + j) - cell.top) * cell.exponent) * scale;
        store(du + k * width + j, p * (pull + push[k]));
        if (kTables) {
          column += p;
          totals[k] += p;
        }
      }
      if (kTables) store(column_sums_ + j, load(column_sums_ + j) + column);
    }
    if (!kTables) return;
    for (int k = 0; k < kCount; ++k) {
      T* sums = line_sums_ + (i + k) * kLanes;
      store(sums, load(sums) + totals[k] * cell.gy);
    }
  }

  // The gradient of u as `ht` lines: the transpose of the blending of lines.
  const T* gather() const {
    const FusionScale& scale = row_.scale();
    const int64_t width = row_.width();
    const T* u = row_.scratch();
    if (row_.whole_target()) return u;
    T* to = gathered_;
    for (int64_t k = 0; k < scale.ht; ++k, to += width) {
      const T* down = down_ + k * op_.h;
      const int64_t from = range_.get()[2 * k], end = range_.get()[2 * k + 1];
      for (int64_t j = 0; j < width; j += kLanes) {
        Vec total = {};
        for (int64_t i = from; i < end; ++i) total += load(u + i * width + j) * down[i];
        store(to + j, total);
      }
    }
    return gathered_;
  }

  // Adds lines to those of four coarse source cells, `below` apart in pairs: the transpose of their blending.
  void spread(const T* from, T* left, T* right, int64_t below, T to_right, T to_below) const {
    const int64_t size = row_.scale().ht * row_.width();
    for (int64_t x = 0; x < size; x += kLanes) {
      const Vec above = load(from + x) * (1 - to_below), under = load(from + x) * to_below;
      store(left + x, load(left + x) + above * (1 - to_right));
      store(right + x, load(right + x) + above * to_right);
      store(left + below + x, load(left + below + x) + under * (1 - to_right));
      store(right + below + x, load(right + below + x) + under * to_right);
    }
  }

  void sum_lines(T* grad_y) const {
    for (int64_t i = 0; i < op_.h; ++i) grad_y[i] += sum<T>(load(line_sums_ + i * kLanes));
  }

  // Brings the lines of one coarse source cell to the target grid, and adds them to (or writes them as) its gradient.
  template <bool kAdd>
  void flush(const T* lines, T* to) const {
    const FusionScale& scale = row_.scale();
    const T* from = lines;
    int64_t length = row_.width();
    if (!row_.whole_target()) {
      length = padded<T>(scale.wt);
      multiply<T>(scale.ht, scale.wt, op_.w, {lines, row_.width(), 1}, shrink_, shrunk_, length);
      from = shrunk_;
    }
    for (int64_t i = 0; i < scale.ht; ++i) {
      for (int64_t j = 0; j < scale.wt; ++j) {
        to[i * scale.wt + j] = (kAdd ? to[i * scale.wt + j] : T(0)) + from[i * length + j];
      }
    }
  }

  const CrossScaleFusionBackward& back_;
  const CrossScaleFusion& op_;
  int64_t index_ = 0;
  FusionRow<In, T> row_;
  Buffer<T> lines_, tables_;
  Buffer<int64_t> range_;
  T *shrunk_ = nullptr, *down_ = nullptr, *shrink_ = nullptr, *gathered_ = nullptr;
  T *column_sums_ = nullptr, *line_sums_ = nullptr;
};

template <class In, class T>
int fuse(const CrossScaleFusion& op) {
  if (!lines_fit<T>(op)) return kOtherLines;
  int status = kDone;
#pragma omp parallel num_threads(op.threads)
  {
    Fusion<In, T> fusion(op);
    if (fusion.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
    for (int64_t s = 0; s < op.scales; ++s) {
      if (!fusion.failed()) fusion.begin_scale(s);
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < op.batch * op.rows; ++task) {
        if (!fusion.failed()) fusion.run(task / op.rows, op.first_row + task % op.rows);
      }
    }
  }
  return status;
}

template <class In, class T>
int fuse_backward(const CrossScaleFusionBackward& back) {
  const CrossScaleFusion& op = back.op;
  if (!lines_fit<T>(op)) return kOtherLines;
  int64_t tasks = 0;
  for (int64_t s = 0; s < op.scales; ++s) tasks += op.batch * op.scale[s].lines;
  const int64_t lanes = Simd<T>::kLanes, width = (op.w + lanes - 1) / lanes * lanes, each = width + op.h;
  const bool tables = back.grad_x != nullptr;
  Buffer<T> parts(tables ? tasks * each : 0);  // of grad_x and grad_y
  if (parts.failed()) return kOutOfMemory;
  int status = kDone;
#pragma omp parallel num_threads(op.threads)
  {
    FusionBackward<In, T> fusion(back);
    if (fusion.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
    int64_t before = 0;
    for (int64_t s = 0; s < op.scales; ++s) {
      const int64_t lines = op.scale[s].lines;
      if (!fusion.failed()) fusion.begin_scale(s);
      for (int64_t odd = 0; odd < 2; ++odd) {
        const int64_t per_image = (lines + 1 - odd) / 2;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < op.batch * per_image; ++task) {
          const int64_t b = task / per_image, line = 2 * (task % per_image) + odd;
          const int64_t coarse = op.scale[s].first_line + line;
          if (fusion.failed()) continue;
          if (!tables) {
            fusion.template run<false>(b, coarse, nullptr, nullptr);
            continue;
          }
          T* part = parts.get() + (before + b * lines + line) * each;
          for (int64_t j = 0; j < each; ++j) part[j] = 0;
          fusion.template run<true>(b, coarse, part, part + width);
        }
      }
      before += op.batch * lines;
    }
  }
  if (!tables) return status;
  for (int64_t j = 0; j < op.w; ++j) static_cast<T*>(back.grad_x)[j] = 0;
  for (int64_t i = 0; i < op.h; ++i) static_cast<T*>(back.grad_y)[i] = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    const T* part = parts.get() + task * each;
    for (int64_t j = 0; j < op.w; ++j) static_cast<T*>(back.grad_x)[j] += part[j];
    for (int64_t i = 0; i < op.h; ++i) static_cast<T*>(back.grad_y)[i] += part[width + i];
  }
  return status;
}

inline int cross_scale_fusion_forward(const CrossScaleFusion& op) {
  return by_type(op.dtype, [&](auto element, auto exact) {
    return fuse<decltype(element), decltype(exact)>(op);
  });
}

inline int cross_scale_fusion_backward(const CrossScaleFusionBackward& back) {
  return by_type(back.op.dtype, [&](auto element, auto exact) {
    return fuse_backward<decltype(element), decltype(exact)>(back);
  });
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
