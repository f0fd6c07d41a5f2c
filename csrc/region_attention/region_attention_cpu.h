// region_attention on the CPU, for the instruction set of the including translation unit.
//
// A task is one head (or a part of its query rows, where heads do not go round evenly), whose keys and values it packs.
// It goes through its queries in blocks whose logits stay in the cache: they begin as the bias, to which the product
// with the keys is added.
// The backward sums grad_k, grad_v and the gradient of the table over the rows of a task in order; parts and batch
// elements are added at the end, in order.
#pragma once

#include "../cpu/buffer.h"
#include "../cpu/element.h"
#include "../cpu/gemm.h"
#include "../cpu/softmax.h"
#include "region_attention.h"
#include "region_attention_bias.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

constexpr int64_t kRegionBlockBytes = 1 << 20;  // of logits

// Query rows of a block, whole tiles: 48, or as many as there is room for.
template <class T>
int64_t region_block_rows(int64_t row_length) {
  const int64_t fit = kRegionBlockBytes / (row_length * int64_t(sizeof(T))) / kTileRows * kTileRows;
  return fit < kTileRows ? kTileRows : fit > 48 ? 48 : fit;
}

template <class In, class T>
class RegionForward {
 public:
  RegionForward(const RegionAttentionForward& op, const RegionBias<T>& bias, int64_t block_rows)
      : op_(op),
        s_(op.shape),
        bias_(bias),
        n_(bias.tokens()),
        keys_(padded<T>(n_)),
        width_(padded<T>(s_.width)),
        scratch_(packed_size<T>(s_.width, n_) + packed_size<T>(n_, s_.width) +
                 block_rows * (s_.width + keys_ + width_ + 1) + kPanel<T>) {
    key_columns_ = scratch_.get();
    value_rows_ = key_columns_ + packed_size<T>(s_.width, n_);
    logits_ = value_rows_ + packed_size<T>(n_, s_.width);
    result_ = logits_ + block_rows * keys_ + kPanel<T>;  // the bias is written a vector too far
    query_ = result_ + block_rows * width_;
    inverse_ = query_ + block_rows * s_.width;
  }

  bool failed() const { return scratch_.failed(); }

  void begin_head(int64_t b, int64_t h) {
    b_ = b;
    h_ = h;
    pack_columns<T>(op_.k.row<In>(b, h, 0), op_.k.token, n_, s_.width, key_columns_);
    pack_rows<T>(op_.v.row<In>(b, h, 0), op_.v.token, n_, s_.width, value_rows_);
  }

  // Rows `start` to `start + rows`; `laid` is the head's table.
  void run(int64_t start, int64_t rows, const T* laid) {
    copy_rows<T>(op_.q.row<In>(b_, h_, start), op_.q.token, rows, s_.width, T(s_.scale), query_);
    for (int64_t i = 0; i < rows; ++i) bias_.write(laid, start + i, logits_ + i * keys_);
    multiply<T, true>(rows, n_, s_.width, {query_, s_.width, 1}, key_columns_, logits_, keys_);
    exponentiate<T>(logits_, rows, n_, keys_, inverse_);
    multiply<T>(rows, s_.width, n_, {logits_, keys_, 1}, value_rows_, result_, width_);
    for (int64_t i = 0; i < rows; ++i) {
      In* attended = static_cast<In*>(op_.attended) + ((b_ * n_ + start + i) * s_.heads + h_) * s_.width;
      const T* from = result_ + i * width_;
      const T weight = inverse_[i];
      for (int64_t d = 0; d < s_.width; ++d) attended[d] = In(from[d] * weight);
    }
  }

 private:
  const RegionAttentionForward& op_;
  const RegionAttentionShape& s_;
  const RegionBias<T>& bias_;
  const int64_t n_, keys_, width_;
  Buffer<T> scratch_;
  int64_t b_ = 0, h_ = 0;
  T *key_columns_, *value_rows_, *logits_, *result_, *query_, *inverse_;
};

// The tables of all heads, laid out anew; called by every thread of a team.
template <class T>
void lay_out_tables(const RegionBias<T>& bias, const void* table, int64_t heads, T* laid) {
#pragma omp for schedule(static)
  for (int64_t h = 0; h < heads; ++h) {
    bias.lay_out(static_cast<const T*>(table) + h * bias.columns(), laid + h * bias.size());
  }
}

template <class In, class T>
int region_forward(const RegionAttentionForward& op) {
  const RegionAttentionShape& s = op.shape;
  const RegionBias<T> bias(s);
  const int64_t n = bias.tokens(), block_rows = region_block_rows<T>(padded<T>(n));
  const int64_t heads = s.batch * s.heads, blocks = (n + block_rows - 1) / block_rows;
  int64_t parts = 1;  // of a head's query rows, so that the threads end at about the same time
  while (parts < blocks && heads * parts < 8 * s.threads && heads * parts % s.threads != 0) ++parts;
  Buffer<T> laid(s.heads * bias.size());
  if (laid.failed()) return kOutOfMemory;
  int status = kDone;
#pragma omp parallel num_threads(s.threads)
  {
    RegionForward<In, T> block(op, bias, block_rows);
    if (block.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
    lay_out_tables(bias, op.table, s.heads, laid.get());
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * parts; ++task) {
      if (block.failed()) continue;
      const int64_t head = task / parts, part = task % parts;
      block.begin_head(head / s.heads, head % s.heads);
      for (int64_t number = blocks * part / parts; number < blocks * (part + 1) / parts; ++number) {
        const int64_t start = number * block_rows;
        const int64_t rows = n - start < block_rows ? n - start : block_rows;
        block.run(start, rows, laid.get() + head % s.heads * bias.size());
      }
    }
  }
  return status;
}

// What a task of the backward sums over its rows: grad_k without the scale, and grad_v, (N, padded width); the
// gradient of the laid out table.
template <class T>
struct RegionSums {
  T *grad_k, *grad_v, *grad_table;

  static int64_t size(const RegionBias<T>& bias, int64_t width) { return 2 * bias.tokens() * width + bias.size(); }
  RegionSums(const RegionBias<T>& bias, int64_t width, T* data)
      : grad_k(data), grad_v(data + bias.tokens() * width), grad_table(data + 2 * bias.tokens() * width) {}
};

// One block of query rows of one head: its part of grad_q, and what it adds to the sums.
template <class In, class T>
class RegionBackward {
 public:
  RegionBackward(const RegionAttentionBackward& op, const RegionBias<T>& bias, int64_t block_rows)
      : op_(op),
        s_(op.shape),
        bias_(bias),
        n_(bias.tokens()),
        keys_(padded<T>(n_)),
        width_(padded<T>(s_.width)),
        scratch_(2 * packed_size<T>(s_.width, n_) + packed_size<T>(n_, s_.width) +
                 block_rows * (2 * keys_ + 3 * width_ + 2 * s_.width + 1) + kPanel<T>) {
    key_columns_ = scratch_.get();
    value_columns_ = key_columns_ + packed_size<T>(s_.width, n_);
    key_rows_ = value_columns_ + packed_size<T>(s_.width, n_);
    p_ = key_rows_ + packed_size<T>(n_, s_.width);
    ds_ = p_ + block_rows * keys_ + kPanel<T>;  // the bias is written a vector too far
    query_packed_ = ds_ + block_rows * keys_;
    grad_packed_ = query_packed_ + block_rows * width_;
    result_ = grad_packed_ + block_rows * width_;
    query_ = result_ + block_rows * width_;
    grad_ = query_ + block_rows * s_.width;
    inverse_ = grad_ + block_rows * s_.width;
  }

  bool failed() const { return scratch_.failed(); }

  void begin_head(int64_t b, int64_t h) {
    b_ = b;
    h_ = h;
    pack_columns<T>(op_.k.row<In>(b, h, 0), op_.k.token, n_, s_.width, key_columns_);
    pack_columns<T>(op_.v.row<In>(b, h, 0), op_.v.token, n_, s_.width, value_columns_);
    pack_rows<T>(op_.k.row<In>(b, h, 0), op_.k.token, n_, s_.width, key_rows_);
  }

  void run(int64_t start, int64_t rows, const T* laid, const RegionSums<T>& sums) {
    const In* q = op_.q.row<In>(b_, h_, start);
    const In* grad = op_.grad_attended.row<In>(b_, h_, start);
    copy_rows<T>(q, op_.q.token, rows, s_.width, T(s_.scale), query_);
    copy_rows<T>(grad, op_.grad_attended.token, rows, s_.width, T(1), grad_);
    for (int64_t i = 0; i < rows; ++i) bias_.write(laid, start + i, p_ + i * keys_);
    multiply<T, true>(rows, n_, s_.width, {query_, s_.width, 1}, key_columns_, p_, keys_);
    exponentiate<T>(p_, rows, n_, keys_, inverse_);
    multiply<T>(rows, n_, s_.width, {grad_, s_.width, 1}, value_columns_, ds_, keys_);
    for (int64_t i = 0; i < rows; ++i) {
      softmax_backward<T>(p_ + i * keys_, ds_ + i * keys_, keys_, inverse_[i]);
      bias_.collect(ds_ + i * keys_, start + i, sums.grad_table);
    }
    multiply<T>(rows, s_.width, n_, {ds_, keys_, 1}, key_rows_, result_, width_);
    In* grad_q = static_cast<In*>(op_.grad_q) + ((b_ * s_.heads + h_) * n_ + start) * s_.width;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < s_.width; ++d) grad_q[i * s_.width + d] = In(result_[i * width_ + d] * T(s_.scale));
    }
    pack_rows<T>(q, op_.q.token, rows, s_.width, query_packed_);
    multiply<T, true>(n_, s_.width, rows, {ds_, 1, keys_}, query_packed_, sums.grad_k, width_);
    pack_rows<T>(grad, op_.grad_attended.token, rows, s_.width, grad_packed_);
    multiply<T, true>(n_, s_.width, rows, {p_, 1, keys_}, grad_packed_, sums.grad_v, width_);
  }

 private:
  const RegionAttentionBackward& op_;
  const RegionAttentionShape& s_;
  const RegionBias<T>& bias_;
  const int64_t n_, keys_, width_;
  Buffer<T> scratch_;
  int64_t b_ = 0, h_ = 0;
  T *key_columns_, *value_columns_, *key_rows_, *p_, *ds_, *query_packed_, *grad_packed_, *result_, *query_, *grad_;
  T* inverse_;
};

template <class In, class T>
int region_backward(const RegionAttentionBackward& op) {
  const RegionAttentionShape& s = op.shape;
  const RegionBias<T> bias(s);
  const int64_t n = bias.tokens(), width = padded<T>(s.width), block_rows = region_block_rows<T>(padded<T>(n));
  const int64_t heads = s.batch * s.heads, blocks = (n + block_rows - 1) / block_rows;
  int64_t parts = s.threads / heads;  // of a head's query rows
  parts = parts < 1 ? 1 : parts > blocks ? blocks : parts;
  int64_t group = s.threads / parts;  // heads done between two barriers: a task a thread
  group = group < 1 ? 1 : group > heads ? heads : group;
  const int64_t size = RegionSums<T>::size(bias, width);
  Buffer<T> data(group * parts * size), laid(s.heads * bias.size()), total(s.heads * bias.size());
  if (data.failed() || laid.failed() || total.failed()) return kOutOfMemory;
  for (int64_t x = 0; x < s.heads * bias.size(); ++x) total.get()[x] = 0;
  int status = kDone;
#pragma omp parallel num_threads(s.threads)
  {
    RegionBackward<In, T> block(op, bias, block_rows);
    if (block.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
    lay_out_tables(bias, op.table, s.heads, laid.get());
    for (int64_t first = 0; first < heads; first += group) {
      const int64_t count = heads - first < group ? heads - first : group;
#pragma omp for schedule(static, 1)
      for (int64_t task = 0; task < count * parts; ++task) {
        if (block.failed()) continue;
        const int64_t head = first + task / parts, part = task % parts;
        T* to = data.get() + task * size;
        for (int64_t x = 0; x < size; ++x) to[x] = 0;
        const RegionSums<T> sums(bias, width, to);
        block.begin_head(head / s.heads, head % s.heads);
        for (int64_t number = blocks * part / parts; number < blocks * (part + 1) / parts; ++number) {
          const int64_t start = number * block_rows;
          const int64_t rows = n - start < block_rows ? n - start : block_rows;
          block.run(start, rows, laid.get() + head % s.heads * bias.size(), sums);
        }
      }
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < count * n; ++row) {
        const int64_t head = row / n, j = row % n;
        const RegionSums<T> sums(bias, width, data.get() + head * parts * size);
        In* grad_k = static_cast<In*>(op.grad_k) + ((first + head) * n + j) * s.width;
        In* grad_v = static_cast<In*>(op.grad_v) + ((first + head) * n + j) * s.width;
        for (int64_t d = 0; d < s.width; ++d) {
          T total_k = 0, total_v = 0;
          for (int64_t part = 0; part < parts; ++part) {
            total_k += sums.grad_k[part * size + j * width + d];
            total_v += sums.grad_v[part * size + j * width + d];
          }
          grad_k[d] = In(total_k * T(s.scale));
          grad_v[d] = In(total_v);
        }
      }
#pragma omp for schedule(static)
      for (int64_t x = 0; x < bias.columns(); ++x) {
        for (int64_t task = 0; task < count * parts; ++task) {
          const int64_t h = (first + task / parts) % s.heads;
          total.get()[h * bias.size() + x] += RegionSums<T>(bias, width, data.get() + task * size).grad_table[x];
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t h = 0; h < s.heads; ++h) {
      bias.restore(total.get() + h * bias.size(), static_cast<T*>(op.grad_table) + h * bias.columns());
    }
  }
  return status;
}

inline int region_attention_forward(const RegionAttentionForward& op) {
  return by_type(op.shape.dtype, [&](auto element, auto exact) {
    return region_forward<decltype(element), decltype(exact)>(op);
  });
}

inline int region_attention_backward(const RegionAttentionBackward& op) {
  return by_type(op.shape.dtype, [&](auto element, auto exact) {
    return region_backward<decltype(element), decltype(exact)>(op);
  });
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
