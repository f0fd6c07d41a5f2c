// cross_scale_fusion on the CPU, for the instruction set of the including translation unit.
//
// A cell's row of u is made in three steps: blend the (up to) four coarse rows of the source side, stretch the result's
// rows to the output width, and blend those in pairs to the output height while the softmax reads them.
// Forward: a task is one row of output source cells.
// Backward: a task is all output rows between two coarse source rows, to whose gradients it adds. Every second task is
// done first and the others after, so that no two write the same coarse row at once, and each sum has one order.
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
  bool same() const { return in == out; }
  int64_t low(int64_t i) const {
    const int64_t at = int64_t(step * T(i));
    return at < in ? at : in - 1;
  }
  int64_t high(int64_t i) const { return low(i) + 1 < in ? low(i) + 1 : low(i); }
  T weight(int64_t i) const { return step * T(i) - T(low(i)); }  // of high(i)
};

template <class In, class T>
class Fusion {
 public:
  using Vec = typename Simd<T>::Vec;
  using Bits = typename Simd<T>::Bits;
  static constexpr int kLanes = Simd<T>::kLanes;

  explicit Fusion(const CrossScaleFusion& op)
      : op_(op),
        width_((op.w + kLanes - 1) / kLanes * kLanes),
        scratch_(2 * largest_row(op) + 2 * kLanes + width_ * (2 * largest_height(op) + op.h + 6)),
        taps_(2 * width_) {
    T* free = scratch_.get();
    auto take = [&free](int64_t count) { return (free += count) - count; };
    if (failed()) return;
    wide_ = take(width_ * largest_height(op));
    grad_wide_ = take(width_ * largest_height(op));
    u_ = take(width_ * op.h);
    columns_ = take(width_);
    weights_ = take(2 * width_);
    valid_ = take(width_);
    x_ = take(width_);
    x_pull_ = take(width_);
    coarse_ = take(largest_row(op) + kLanes);
    grad_coarse_ = take(largest_row(op) + kLanes);
    for (int64_t j = 0; j < width_; ++j) {
      valid_[j] = j < op.w;
      x_[j] = j < op.w ? static_cast<const T*>(op.x)[j] : 0;
    }
  }

  bool failed() const { return scratch_.failed() || taps_.failed(); }

  void begin_scale(int64_t s) {
    s_ = op_.scale + s;
    index_ = s;
    whole_source_ = s_->hs == op_.h && s_->ws == op_.w;
    whole_target_ = s_->ht == op_.h && s_->wt == op_.w;
    const Axis<T> axis(s_->wt, op_.w);
    narrow_ = true;
    for (int64_t j = 0; j < width_; ++j) {
      const int64_t column = j < op_.w ? j : op_.w - 1;  // what lies beyond the width repeats its last column
      taps_.get()[2 * j] = axis.low(column);
      taps_.get()[2 * j + 1] = axis.high(column);
      weights_[j] = 1 - axis.weight(column);
      weights_[width_ + j] = axis.weight(column);
      narrow_ = narrow_ && axis.high(column) - taps_.get()[2 * (j / kLanes * kLanes)] < kLanes;
    }
  }

  void forward_row(int64_t b, int64_t r) {
    const T* y = static_cast<const T*>(op_.y);
    for (int64_t c = 0; c < op_.w; ++c) {
      const T top = make_u(b, r, c);
      const T* u = u_;
      for (int64_t j = 0; j < width_; j += kLanes) store(columns_ + j, Vec{});
      Vec by_row = {};
      const T cold = T(1 / op_.temperature);
      for (int64_t i = 0; i < op_.h; ++i) {
        for (int64_t j = 0; j < width_; j += kLanes, u += kLanes) {
          const Vec p = exp_nonpositive<T>((load(u) - top) * cold) * load(valid_ + j);
          store(columns_ + j, load(columns_ + j) + p);
          by_row += p * y[i];
        }
      }
      Vec total = {}, by_column = {};
      for (int64_t j = 0; j < width_; j += kLanes) {
        total += load(columns_ + j);
        by_column += load(columns_ + j) * load(x_ + j);
      }
      const T inverse = 1 / sum<T>(total);
      const int64_t cells = op_.h * op_.w, at = (b * op_.scales + index_) * cells + r * op_.w + c;
      static_cast<T*>(op_.mapping)[at + (at - r * op_.w - c)] = sum<T>(by_column) * inverse;
      static_cast<T*>(op_.mapping)[at + (at - r * op_.w - c) + cells] = sum<T>(by_row) * inverse;
      static_cast<T*>(op_.confidence)[at] = inverse;  // the largest probability is that of u = top
      static_cast<T*>(op_.largest)[at] = top;
    }
  }

  // The output rows whose upper coarse row is `coarse`: adds to its gradients, to those of the next coarse row, and to
  // grad_x (padded width) and grad_y (h).
  void backward_rows(const CrossScaleFusionBackward& back, int64_t b, int64_t coarse, T* grad_x, T* grad_y) {
    const Axis<T> axis(s_->hs, op_.h);
    for (int64_t r = 0; r < op_.h; ++r) {
      if ((whole_source_ ? r : axis.low(r)) != coarse) continue;
      for (int64_t c = 0; c < op_.w; ++c) backward_cell(back, b, r, c, grad_x, grad_y);
    }
  }

  int64_t padded_width() const { return width_; }

 private:
  static int64_t largest_row(const CrossScaleFusion& op) {
    int64_t most = 0;
    for (int64_t s = 0; s < op.scales; ++s) {
      const int64_t size = op.scale[s].ht * op.scale[s].wt;
      most = size > most ? size : most;
    }
    return most + kLanes;
  }

  static int64_t largest_height(const CrossScaleFusion& op) {
    int64_t most = 0;
    for (int64_t s = 0; s < op.scales; ++s) most = op.scale[s].ht > most ? op.scale[s].ht : most;
    return most;
  }

  const In* corr_row(int64_t b, int64_t line, int64_t column) const {
    return static_cast<const In*>(s_->corr) + b * s_->batch + (line * s_->ws + column) * s_->row;
  }

  // u of output source cell (r, c) in u_, whose rows are `width_` long; the largest of it.
  T make_u(int64_t b, int64_t r, int64_t c) {
    blend_source(b, r, c);
    Vec highest = Vec{} - T(__builtin_huge_val());
    T* u = u_;
    if (whole_target_) {
      for (int64_t i = 0; i < op_.h; ++i, u += width_) {
        const T* from = coarse_ + i * op_.w;
        for (int64_t j = 0; j < op_.w; ++j) u[j] = from[j];
        for (int64_t j = op_.w; j < width_; ++j) u[j] = from[op_.w - 1];
        for (int64_t j = 0; j < width_; j += kLanes) highest = greater(load(u + j), highest);
      }
    } else {
      stretch();
      const Axis<T> axis(s_->ht, op_.h);
      for (int64_t i = 0; i < op_.h; ++i, u += width_) {
        const T *above = wide_ + axis.low(i) * width_, *below = wide_ + axis.high(i) * width_;
        const T weight = axis.weight(i);
        for (int64_t j = 0; j < width_; j += kLanes) {
          const Vec x = load(above + j) * (1 - weight) + load(below + j) * weight;
          store(u + j, x);
          highest = greater(x, highest);
        }
      }
    }
    T top = highest[0];
    for (int lane = 1; lane < kLanes; ++lane) top = highest[lane] > top ? highest[lane] : top;
    return top;
  }

  static Vec greater(Vec x, Vec highest) { return x > highest ? x : highest; }

  // coarse_: the row of the source cell, still on the target grid of the tensor.
  void blend_source(int64_t b, int64_t r, int64_t c) {
    const int64_t size = s_->ht * s_->wt;
    if (whole_source_) {
      const In* from = corr_row(b, r, c);
      for (int64_t j = 0; j < size; ++j) coarse_[j] = T(from[j]);
      return;
    }
    const Axis<T> lines(s_->hs, op_.h), columns(s_->ws, op_.w);
    const In *a = corr_row(b, lines.low(r), columns.low(c)), *a2 = corr_row(b, lines.low(r), columns.high(c));
    const In *z = corr_row(b, lines.high(r), columns.low(c)), *z2 = corr_row(b, lines.high(r), columns.high(c));
    const T down = lines.weight(r), right = columns.weight(c), up = 1 - down, left = 1 - right;
    for (int64_t j = 0; j < size; ++j) {
      coarse_[j] = up * (left * T(a[j]) + right * T(a2[j])) + down * (left * T(z[j]) + right * T(z2[j]));
    }
  }

  // wide_: the rows of coarse_ at the output width. Where a vector's taps lie within one vector of the row, which is so
  // for every enlargement by more than a little, they are picked from it; else one by one.
  void stretch() {
    const int64_t* taps = taps_.get();
    for (int64_t j = 0; j < width_; j += kLanes) {
      const int64_t first = taps[2 * j];
      const Vec left = load(weights_ + j), right = load(weights_ + width_ + j);
      Bits low, high;
      for (int lane = 0; lane < kLanes; ++lane) {
        low[lane] = taps[2 * (j + lane)] - first;
        high[lane] = taps[2 * (j + lane) + 1] - first;
      }
      for (int64_t i = 0; i < s_->ht; ++i) {
        const T* from = coarse_ + i * s_->wt + first;
        Vec a, b;
        if (narrow_) {
          const Vec all = load(from);
          a = __builtin_shuffle(all, low);
          b = __builtin_shuffle(all, high);
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

  void backward_cell(const CrossScaleFusionBackward& back, int64_t b, int64_t r, int64_t c, T* grad_x, T* grad_y) {
    const int64_t cells = op_.h * op_.w, first = (b * op_.scales + index_) * cells, cell = r * op_.w + c;
    const T gx = static_cast<const T*>(back.grad_mapping)[2 * first + cell];
    const T gy = static_cast<const T*>(back.grad_mapping)[2 * first + cells + cell];
    const T mean_x = static_cast<const T*>(op_.mapping)[2 * first + cell];
    const T mean_y = static_cast<const T*>(op_.mapping)[2 * first + cells + cell];
    const T inverse = static_cast<const T*>(op_.confidence)[first + cell];
    const T top = static_cast<const T*>(op_.largest)[first + cell];
    const T cold = T(1 / op_.temperature);
    make_u(b, r, c);
    for (int64_t j = 0; j < width_; j += kLanes) store(x_pull_ + j, (load(x_ + j) - mean_x) * (gx * cold));
    const Axis<T> axis(s_->ht, op_.h);
    if (!whole_target_) {
      for (int64_t j = 0; j < s_->ht * width_; j += kLanes) store(grad_wide_ + j, Vec{});
    }
    for (int64_t i = 0; i < op_.h; ++i) {
      T* u = u_ + i * width_;
      const T y_pull = (static_cast<const T*>(op_.y)[i] - mean_y) * (gy * cold);
      T *above = grad_wide_ + axis.low(i) * width_, *below = grad_wide_ + axis.high(i) * width_;
      const T weight = axis.weight(i);
      Vec row = {};
      for (int64_t j = 0; j < width_; j += kLanes) {
        const Vec p = exp_nonpositive<T>((load(u + j) - top) * cold) * (load(valid_ + j) * inverse);
        const Vec grad = p * (load(x_pull_ + j) + y_pull);
        row += p;
        store(grad_x + j, load(grad_x + j) + p * gx);
        if (whole_target_) {
          store(u + j, grad);
        } else {
          store(above + j, load(above + j) + grad * (1 - weight));
          store(below + j, load(below + j) + grad * weight);
        }
      }
      grad_y[i] += sum<T>(row) * gy;
    }
    shrink();
    spread(b, r, c);
  }

  // grad_coarse_: the transpose of stretch (of the copy into u_, where the target side is not interpolated).
  void shrink() {
    if (whole_target_) {
      for (int64_t i = 0; i < op_.h; ++i) {
        for (int64_t j = 0; j < op_.w; ++j) grad_coarse_[i * op_.w + j] = u_[i * width_ + j];
      }
      return;
    }
    const int64_t* taps = taps_.get();
    for (int64_t i = 0; i < s_->ht; ++i) {
      T* to = grad_coarse_ + i * s_->wt;
      const T* from = grad_wide_ + i * width_;
      for (int64_t j = 0; j < s_->wt; ++j) to[j] = 0;
      for (int64_t j = 0; j < op_.w; ++j) {
        to[taps[2 * j]] += weights_[j] * from[j];
        to[taps[2 * j + 1]] += weights_[width_ + j] * from[j];
      }
    }
  }

  // The transpose of blend_source: from grad_coarse_ to the gradients of up to four coarse rows.
  void spread(int64_t b, int64_t r, int64_t c) {
    const int64_t size = s_->ht * s_->wt;
    T* grad = static_cast<T*>(s_->grad) + b * s_->hs * s_->ws * size;
    if (whole_source_) return add(grad + (r * op_.w + c) * size, size, 1);
    const Axis<T> lines(s_->hs, op_.h), columns(s_->ws, op_.w);
    const T down = lines.weight(r), right = columns.weight(c);
    T *above = grad + lines.low(r) * s_->ws * size, *below = grad + lines.high(r) * s_->ws * size;
    add(above + columns.low(c) * size, size, (1 - down) * (1 - right));
    add(above + columns.high(c) * size, size, (1 - down) * right);
    add(below + columns.low(c) * size, size, down * (1 - right));
    add(below + columns.high(c) * size, size, down * right);
  }

  void add(T* to, int64_t size, T weight) const {
    for (int64_t j = 0; j < size; ++j) to[j] += weight * grad_coarse_[j];
  }

  const CrossScaleFusion& op_;
  const int64_t width_;  // w rounded up to whole vectors
  const FusionScale* s_ = nullptr;
  int64_t index_ = 0;
  bool whole_source_ = false, whole_target_ = false, narrow_ = false;
  Buffer<T> scratch_;
  Buffer<int64_t> taps_;
  T *wide_, *grad_wide_, *u_, *columns_, *weights_, *valid_, *x_, *x_pull_, *coarse_, *grad_coarse_;
};

template <class In, class T>
int fuse(const CrossScaleFusion& op) {
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
      for (int64_t task = 0; task < op.batch * op.h; ++task) {
        if (!fusion.failed()) fusion.forward_row(task / op.h, task % op.h);
      }
    }
  }
  return status;
}

template <class In, class T>
int fuse_backward(const CrossScaleFusionBackward& back) {
  const CrossScaleFusion& op = back.op;
  int64_t tasks = 0;
  for (int64_t s = 0; s < op.scales; ++s) tasks += op.batch * op.scale[s].hs;
  const int64_t lanes = Simd<T>::kLanes, width = (op.w + lanes - 1) / lanes * lanes, each = width + op.h;
  Buffer<T> parts(tasks * each);  // of grad_x and grad_y
  if (parts.failed()) return kOutOfMemory;
  int status = kDone;
#pragma omp parallel num_threads(op.threads)
  {
    Fusion<In, T> fusion(op);
    if (fusion.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
    int64_t before = 0;
    for (int64_t s = 0; s < op.scales; ++s) {
      const int64_t lines = op.scale[s].hs;
      if (!fusion.failed()) fusion.begin_scale(s);
      for (int64_t odd = 0; odd < 2; ++odd) {
        const int64_t per_image = (lines + 1 - odd) / 2;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < op.batch * per_image; ++task) {
          const int64_t b = task / per_image, line = 2 * (task % per_image) + odd;
          T* part = parts.get() + (before + b * lines + line) * each;
          for (int64_t j = 0; j < each; ++j) part[j] = 0;
          if (!fusion.failed()) fusion.backward_rows(back, b, line, part, part + width);
        }
      }
      before += op.batch * lines;
    }
  }
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
  switch (op.dtype) {
    case Dtype::kFloat32: return fuse<float, float>(op);
    case Dtype::kFloat64: return fuse<double, double>(op);
    case Dtype::kBFloat16: return fuse<BFloat16, float>(op);
    case Dtype::kFloat16:
#if LPMFLOW_HAS_FLOAT16
      return fuse<Float16, float>(op);
#else
      break;
#endif
  }
  return kNoFloat16;
}

inline int cross_scale_fusion_backward(const CrossScaleFusionBackward& back) {
  switch (back.op.dtype) {
    case Dtype::kFloat32: return fuse_backward<float, float>(back);
    case Dtype::kFloat64: return fuse_backward<double, double>(back);
    case Dtype::kBFloat16: return fuse_backward<BFloat16, float>(back);
    case Dtype::kFloat16:
#if LPMFLOW_HAS_FLOAT16
      return fuse_backward<Float16, float>(back);
#else
      break;
#endif
  }
  return kNoFloat16;
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
