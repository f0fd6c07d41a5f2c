// correlation on the CPU, for the instruction set of the including translation unit.
//
// Forward: a task is a block of query rows of one batch element. All keys of a head fit in the cache beside the
// block's logits, so softmax, head sum and values are done in one pass with the logits never leaving the cache, and
// no two tasks write the same entry of corr. Keys and values are packed once per batch element.
// Backward: a task is one head (or a part of its query rows, where there are fewer heads than threads), which sums
// grad_k and grad_v over its rows in order; parts are added at the end, in order.
#pragma once

#include "../cpu/buffer.h"
#include "../cpu/element.h"
#include "../cpu/gemm.h"
#include "../cpu/softmax.h"
#include "correlation.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

constexpr int64_t kQueryRows = 48;          // logits of 48 x 1025 float32 are 200 KB
constexpr int64_t kPackedBytes = 32 << 20;  // keys and values packed at once, when the batch is large

template <class In, class T>
int forward(const CorrelationForward& op) {
  const CorrelationShape& s = op.shape;
  const int64_t keys = padded<T>(s.m), values = padded<T>(s.width);
  const int64_t packed_keys = packed_size<T>(s.width, s.m), packed_values = packed_size<T>(s.m, s.width);
  const int64_t head_size = packed_keys + packed_values;
  int64_t at_once = kPackedBytes / (s.heads * head_size * int64_t(sizeof(T)));
  at_once = at_once < 1 ? 1 : at_once > s.batch ? s.batch : at_once;
  const int64_t blocks = (s.n + kQueryRows - 1) / kQueryRows;
  const int64_t corr_rows = s.n - s.prefix, corr_columns = s.m - s.prefix;
  Buffer<T> packed(at_once * s.heads * head_size);
  if (packed.failed()) return kOutOfMemory;
  int status = kDone;
#pragma omp parallel num_threads(s.threads)
  {
    Buffer<T> scratch(kQueryRows * (s.width + keys + values + 1));
    T* query = scratch.get();
    T* logits = query + kQueryRows * s.width;
    T* sums = logits + kQueryRows * keys;
    T* inverse = sums + kQueryRows * values;
    if (scratch.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
    for (int64_t first = 0; first < s.batch; first += at_once) {
      const int64_t count = s.batch - first < at_once ? s.batch - first : at_once;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < count * s.heads; ++task) {
        const int64_t b = first + task / s.heads, h = task % s.heads;
        T* to = packed.get() + task * head_size;
        pack_columns<T>(op.k.row<In>(b, h, 0), op.k.token, s.m, s.width, to);
        pack_rows<T>(op.v.row<In>(b, h, 0), op.v.token, s.m, s.width, to + packed_keys);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < count * blocks; ++task) {
        if (scratch.failed()) continue;
        const int64_t b = first + task / blocks, start = task % blocks * kQueryRows;
        const int64_t rows = s.n - start < kQueryRows ? s.n - start : kQueryRows;
        for (int64_t h = 0; h < s.heads; ++h) {
          const T* head = packed.get() + (task / blocks * s.heads + h) * head_size;
          copy_rows<T>(op.q.row<In>(b, h, start), op.q.token, rows, s.width, T(s.scale), query);
          multiply<T>(rows, s.m, s.width, {query, s.width, 1}, head, logits, keys);
          exponentiate<T>(logits, rows, s.m, keys, inverse);
          multiply<T>(rows, s.width, s.m, {logits, keys, 1}, head + packed_keys, sums, values);
          In* attended = static_cast<In*>(op.attended) + ((b * s.heads + h) * s.n + start) * s.width;
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t d = 0; d < s.width; ++d) attended[i * s.width + d] = In(sums[i * values + d] * inverse[i]);
            const int64_t r = start + i - s.prefix;
            if (r < 0) continue;
            T* corr = static_cast<T*>(op.corr) + (b * corr_rows + r) * corr_columns;
            const T* p = logits + i * keys + s.prefix;
            const T weight = inverse[i];
            if (h == 0) {
              for (int64_t j = 0; j < corr_columns; ++j) corr[j] = p[j] * weight;
            } else {
              for (int64_t j = 0; j < corr_columns; ++j) corr[j] += p[j] * weight;
            }
          }
        }
      }
    }
  }
  return status;
}

// One block of query rows of one head: its part of grad_q, and what it adds to grad_k and grad_v.
template <class In, class T>
class BackwardBlock {
 public:
  BackwardBlock(const CorrelationBackward& op)
      : op_(op),
        s_(op.shape),
        keys_(padded<T>(s_.m)),
        width_(padded<T>(s_.width)),
        scratch_(kQueryRows * (2 * s_.width + 2 * keys_ + 3 * width_ + 1) + packed_size<T>(s_.width, s_.m) * 2 +
                 packed_size<T>(s_.m, s_.width)) {
    query_ = scratch_.get();
    grad_ = query_ + kQueryRows * s_.width;
    p_ = grad_ + kQueryRows * s_.width;
    ds_ = p_ + kQueryRows * keys_;
    query_packed_ = ds_ + kQueryRows * keys_;
    grad_packed_ = query_packed_ + kQueryRows * width_;
    result_ = grad_packed_ + kQueryRows * width_;
    inverse_ = result_ + kQueryRows * width_;
    key_columns_ = inverse_ + kQueryRows;
    value_columns_ = key_columns_ + packed_size<T>(s_.width, s_.m);
    key_rows_ = value_columns_ + packed_size<T>(s_.width, s_.m);
  }

  bool failed() const { return scratch_.failed(); }

  void begin_head(int64_t b, int64_t h) {
    b_ = b;
    h_ = h;
    pack_columns<T>(op_.k.row<In>(b, h, 0), op_.k.token, s_.m, s_.width, key_columns_);
    pack_columns<T>(op_.v.row<In>(b, h, 0), op_.v.token, s_.m, s_.width, value_columns_);
    pack_rows<T>(op_.k.row<In>(b, h, 0), op_.k.token, s_.m, s_.width, key_rows_);
  }

  // grad_k and grad_v are (M, padded width), added to; grad_k without the scale.
  void run(int64_t start, int64_t rows, T* grad_k, T* grad_v) {
    const bool values = op_.grad_attended.data != nullptr;
    const In* q = op_.q.row<In>(b_, h_, start);
    copy_rows<T>(q, op_.q.token, rows, s_.width, T(s_.scale), query_);
    multiply<T>(rows, s_.m, s_.width, {query_, s_.width, 1}, key_columns_, p_, keys_);
    exponentiate<T>(p_, rows, s_.m, keys_, inverse_);
    if (values) {
      const In* grad = op_.grad_attended.row<In>(b_, h_, start);
      copy_rows<T>(grad, op_.grad_attended.token, rows, s_.width, T(1), grad_);
      multiply<T>(rows, s_.m, s_.width, {grad_, s_.width, 1}, value_columns_, ds_, keys_);
      pack_rows<T>(grad, op_.grad_attended.token, rows, s_.width, grad_packed_);
    }
    for (int64_t i = 0; i < rows; ++i) {
      add_grad_corr(start + i, ds_ + i * keys_, values);
      softmax_backward<T>(p_ + i * keys_, ds_ + i * keys_, keys_, inverse_[i]);
    }
    multiply<T>(rows, s_.width, s_.m, {ds_, keys_, 1}, key_rows_, result_, width_);
    In* grad_q = static_cast<In*>(op_.grad_q) + ((b_ * s_.heads + h_) * s_.n + start) * s_.width;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < s_.width; ++d) grad_q[i * s_.width + d] = In(result_[i * width_ + d] * T(s_.scale));
    }
    pack_rows<T>(q, op_.q.token, rows, s_.width, query_packed_);
    multiply<T, true>(s_.m, s_.width, rows, {ds_, 1, keys_}, query_packed_, grad_k, width_);
    if (values) multiply<T, true>(s_.m, s_.width, rows, {p_, 1, keys_}, grad_packed_, grad_v, width_);
  }

 private:
  // ds: grad_attended . v, when there are `values` -> dP.
  void add_grad_corr(int64_t row, T* ds, bool values) const {
    if (!values) {
      for (int64_t j = 0; j < keys_; ++j) ds[j] = 0;
    }
    if (op_.grad_corr == nullptr || row < s_.prefix) return;
    const T* grad =
        static_cast<const T*>(op_.grad_corr) + b_ * op_.grad_corr_batch + (row - s_.prefix) * op_.grad_corr_row;
    T* to = ds + s_.prefix;
    for (int64_t j = 0; j < s_.m - s_.prefix; ++j) to[j] += grad[j];
  }

  const CorrelationBackward& op_;
  const CorrelationShape& s_;
  const int64_t keys_, width_;
  Buffer<T> scratch_;
  int64_t b_ = 0, h_ = 0;
  T *query_, *grad_, *p_, *ds_, *query_packed_, *grad_packed_, *result_, *inverse_;
  T *key_columns_, *value_columns_, *key_rows_;
};

template <class In, class T>
int backward(const CorrelationBackward& op) {
  const CorrelationShape& s = op.shape;
  const int64_t width = padded<T>(s.width), blocks = (s.n + kQueryRows - 1) / kQueryRows;
  const int64_t heads = s.batch * s.heads;
  int64_t parts = s.threads / heads;  // of a head's query rows
  parts = parts < 1 ? 1 : parts > blocks ? blocks : parts;
  int64_t group = s.threads / parts;  // heads done between two barriers: a task a thread
  group = group < 1 ? 1 : group > heads ? heads : group;
  Buffer<T> sums(group * parts * 2 * s.m * width);
  if (sums.failed()) return kOutOfMemory;
  int status = kDone;
#pragma omp parallel num_threads(s.threads)
  {
    BackwardBlock<In, T> block(op);
    if (block.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
    for (int64_t first = 0; first < heads; first += group) {
      const int64_t count = heads - first < group ? heads - first : group;
#pragma omp for schedule(static, 1)
      for (int64_t task = 0; task < count * parts; ++task) {
        if (block.failed()) continue;
        const int64_t head = first + task / parts, part = task % parts;
        T* grad_k = sums.get() + task * 2 * s.m * width;
        T* grad_v = grad_k + s.m * width;
        for (int64_t x = 0; x < 2 * s.m * width; ++x) grad_k[x] = 0;
        block.begin_head(head / s.heads, head % s.heads);
        for (int64_t number = blocks * part / parts; number < blocks * (part + 1) / parts; ++number) {
          const int64_t start = number * kQueryRows;
          block.run(start, s.n - start < kQueryRows ? s.n - start : kQueryRows, grad_k, grad_v);
        }
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < count * s.m; ++row) {
        const int64_t head = row / s.m, j = row % s.m;
        const T* grad = sums.get() + head * parts * 2 * s.m * width + j * width;
        In* grad_k = static_cast<In*>(op.grad_k) + ((first + head) * s.m + j) * s.width;
        In* grad_v = static_cast<In*>(op.grad_v) + ((first + head) * s.m + j) * s.width;
        for (int64_t d = 0; d < s.width; ++d) {
          T total_k = 0, total_v = 0;
          for (int64_t part = 0; part < parts; ++part) {
            total_k += grad[part * 2 * s.m * width + d];
            total_v += grad[part * 2 * s.m * width + s.m * width + d];
          }
          grad_k[d] = In(total_k * T(s.scale));
          grad_v[d] = In(total_v);
        }
      }
    }
  }
  return status;
}

inline int correlation_forward(const CorrelationForward& op) {
  return by_type(op.shape.dtype, [&](auto element, auto exact) {
    return forward<decltype(element), decltype(exact)>(op);
  });
}

inline int correlation_backward(const CorrelationBackward& op) {
  return by_type(op.shape.dtype, [&](auto element, auto exact) {
    return backward<decltype(element), decltype(exact)>(op);
  });
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
