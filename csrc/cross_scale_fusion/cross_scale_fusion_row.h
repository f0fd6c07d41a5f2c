// The logits u of one output source cell, in three steps: blend the (up to) four coarse rows of the source side, stretch
// the lines of the result to the output width, and blend those in pairs to the output height.
#pragma once

#include "../cpu/buffer.h"
#include "../cpu/element.h"
#include "cross_scale_fusion.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

// One axis of bilinear interpolation, `align_corners`, with the rounding of PyTorch's.
template <class T>
struct Axis {
  int64_t in, out;
  T step;

  Axis(int64_t in_, int64_t out_) : in(in_), out(out_), step(out_ > 1 ? T(in_ - 1) / T(out_ - 1) : T(0)) {}
  int64_t low(int64_t i) const {
    const int64_t at = int64_t(step * T(i));
    return at < in ? at : in - 1;
  }
  // An axis that keeps its length has no neighbours to read, which would matter where they are NaN.
  int64_t high(int64_t i) const { return in != out && low(i) + 1 < in ? low(i) + 1 : low(i); }
  T weight(int64_t i) const { return step * T(i) - T(low(i)); }  // of high(i)
};

// Whether each scale has the coarse lines that the output lines lie between and, where it is not interpolated, no others.
template <class T>
bool lines_fit(const CrossScaleFusion& op) {
  for (int64_t s = 0; s < op.scales; ++s) {
    const FusionScale& scale = op.scale[s];
    if (scale.hs == op.h && scale.ws == op.w) {
      if (scale.first_line != op.first_row || scale.lines != op.rows) return false;
      continue;
    }
    const Axis<T> lines(scale.hs, op.h);
    if (lines.low(op.first_row) < scale.first_line) return false;
    if (lines.high(op.first_row + op.rows - 1) >= scale.first_line + scale.lines) return false;
  }
  return true;
}

template <class In, class T>
class FusionRow {
 public:
  using Vec = typename Simd<T>::Vec;
  using Bits = typename Simd<T>::Bits;
  using Index = typename Simd<T>::Index;
  static constexpr int kLanes = Simd<T>::kLanes;

  explicit FusionRow(const CrossScaleFusion& op)
      : op_(op),
        width_((op.w + kLanes - 1) / kLanes * kLanes),
        scratch_(width_ * (most(op, false) + op.h + 4) + op.h + most(op, true) + kLanes),
        taps_(2 * width_ + 2 * op.h) {
    if (failed()) return;
    u_ = scratch_.get();
    wide_ = u_ + width_ * op.h;
    weights_ = wide_ + width_ * most(op, false);
    valid_ = weights_ + 2 * width_;
    x_ = valid_ + width_;
    to_below_ = x_ + width_;
    coarse_ = to_below_ + op.h;
    low_ = taps_.get();
    high_ = low_ + width_;
    above_ = high_ + width_;
    below_ = above_ + op.h;
    for (int64_t j = 0; j < width_; ++j) {
      valid_[j] = j < op.w;
      x_[j] = j < op.w ? static_cast<const T*>(op.x)[j] : 0;
    }
  }

  bool failed() const { return scratch_.failed() || taps_.failed(); }

  void begin_scale(int64_t s) {
    s_ = op_.scale + s;
    whole_source_ = s_->hs == op_.h && s_->ws == op_.w;
    whole_target_ = s_->ht == op_.h && s_->wt == op_.w;
    const Axis<T> columns(s_->wt, op_.w), lines(s_->ht, op_.h);
    narrow_ = true;
    for (int64_t j = 0; j < width_; ++j) {
      const int64_t column = j < op_.w ? j : op_.w - 1;  // what lies beyond the width repeats its last column
      low_[j] = Index(columns.low(column));
      high_[j] = Index(columns.high(column));
      weights_[j] = 1 - columns.weight(column);
      weights_[width_ + j] = columns.weight(column);
      narrow_ = narrow_ && high_[j] - low_[j / kLanes * kLanes] < kLanes;
    }
    for (int64_t i = 0; i < op_.h; ++i) {
      above_[i] = Index(lines.low(i));
      below_[i] = Index(lines.high(i));
      to_below_[i] = lines.weight(i);
    }
  }

  // Finds u() of output source cell (r, c) of batch element b; the largest of it, unless that is known already.
  template <bool kLargest>
  T make(int64_t b, int64_t r, int64_t c) {
    const T* coarse = blend_source(b, r, c);
    Vec highest = Vec{} - T(__builtin_huge_val());
    if (!whole_target_) {
      stretch(coarse);
      for (int64_t i = 0; i < op_.h; ++i) {
        const T *above = wide_ + above_[i] * width_, *below = wide_ + below_[i] * width_;
        const T weight = to_below_[i];
        for (int64_t j = 0; j < width_; j += kLanes) {
          const Vec x = load(above + j) * (1 - weight) + load(below + j) * weight;
          store(u_ + i * width_ + j, x);
          if (kLargest) highest = greater(x, highest);
        }
      }
      values_ = u_;
    } else if (op_.w == width_) {
      values_ = coarse;
      if (kLargest) {
        for (int64_t j = 0; j < op_.h * width_; j += kLanes) highest = greater(load(coarse + j), highest);
      }
    } else {
      const int64_t inner = width_ - kLanes;
      for (int64_t i = 0; i < op_.h; ++i, coarse += op_.w) {
        T* u = u_ + i * width_;
        for (int64_t j = 0; j < inner; j += kLanes) {
          const Vec x = load(coarse + j);
          store(u + j, x);
          if (kLargest) highest = greater(x, highest);
        }
        for (int64_t j = inner; j < width_; ++j) u[j] = coarse[j < op_.w ? j : op_.w - 1];
        if (kLargest) highest = greater(load(u + inner), highest);
      }
      values_ = u_;
    }
    T top = highest[0];
    for (int lane = 1; lane < kLanes; ++lane) top = highest[lane] > top ? highest[lane] : top;
    return top;
  }

  const FusionScale& scale() const { return *s_; }
  bool whole_source() const { return whole_source_; }
  bool whole_target() const { return whole_target_; }
  int64_t width() const { return width_; }      // w rounded up to whole vectors: the length of a line of u
  const T* u() const { return values_; }        // (h, width)
  T* scratch() const { return u_; }             // (h, width): where u() may lie
  const T* valid() const { return valid_; }     // (width): 1, and 0 beyond w
  const T* x() const { return x_; }             // (width): the table, and 0 beyond w

 private:
  // The largest target grid of a scale: its cells, or its height.
  static int64_t most(const CrossScaleFusion& op, bool cells) {
    int64_t found = 0;
    for (int64_t s = 0; s < op.scales; ++s) {
      const int64_t size = op.scale[s].ht * (cells ? op.scale[s].wt : 1);
      found = size > found ? size : found;
    }
    return found;
  }

  static Vec greater(Vec x, Vec highest) { return x > highest ? x : highest; }

  const In* corr_row(int64_t b, int64_t line, int64_t column) const {
    return static_cast<const In*>(s_->corr) + b * s_->batch + ((line - s_->first_line) * s_->ws + column) * s_->row;
  }

  // The row of the source cell, still on the target grid of the tensor: in coarse_, which has room for a load that begins
  // inside it, or where it lies. The last row of a tensor has no such room.
  const T* blend_source(int64_t b, int64_t r, int64_t c) {
    const int64_t size = s_->ht * s_->wt;
    T* to = coarse_;
    if (whole_source_) {
      const In* from = corr_row(b, r, c);
      if constexpr (sizeof(In) == sizeof(T)) {
        if (whole_target_) return from;
      }
      for (int64_t j = 0; j < size; ++j) to[j] = T(from[j]);
      return to;
    }
    const Axis<T> lines(s_->hs, op_.h), columns(s_->ws, op_.w);
    const In *a = corr_row(b, lines.low(r), columns.low(c)), *a2 = corr_row(b, lines.low(r), columns.high(c));
    const In *z = corr_row(b, lines.high(r), columns.low(c)), *z2 = corr_row(b, lines.high(r), columns.high(c));
    const T down = lines.weight(r), right = columns.weight(c), up = 1 - down, left = 1 - right;
    for (int64_t j = 0; j < size; ++j) {
      to[j] = up * (left * T(a[j]) + right * T(a2[j])) + down * (left * T(z[j]) + right * T(z2[j]));
    }
    return to;
  }

  // wide_: the lines of `coarse` at the output width. Where a vector's taps lie within one vector of the line, which is
  // so for every enlargement by more than a little, they are picked from it; else one by one.
  void stretch(const T* coarse) {
    for (int64_t j = 0; j < width_; j += kLanes) {
      const Vec left = load(weights_ + j), right = load(weights_ + width_ + j);
      Bits low, high;
      std::memcpy(&low, low_ + j, sizeof low);
      std::memcpy(&high, high_ + j, sizeof high);
      const Index first = low_[j];
      low -= first;
      high -= first;
      for (int64_t i = 0; i < s_->ht; ++i) {
        const T* from = coarse + i * s_->wt + first;
        Vec a, b;
        if (narrow_) {
          const Vec all = load(from);
          a = pick<T>(all, low);
          b = pick<T>(all, high);
        } else {
          for (int lane = 0; lane < kLanes; ++lane) {
            a[lane] = from[low[lane]];
            b[lane] = from[high[lane]];
          }
        }
        store(wide_ + i * width_ + j, a * left + b * right);
      }
    }
  }

  const CrossScaleFusion& op_;
  const int64_t width_;
  const FusionScale* s_ = nullptr;
  bool whole_source_ = false, whole_target_ = false, narrow_ = false;
  Buffer<T> scratch_;
  Buffer<Index> taps_;
  const T* values_ = nullptr;
  T *u_ = nullptr, *wide_ = nullptr, *weights_ = nullptr, *valid_ = nullptr, *x_ = nullptr, *to_below_ = nullptr;
  T* coarse_ = nullptr;
  Index *low_ = nullptr, *high_ = nullptr, *above_ = nullptr, *below_ = nullptr;
};

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
