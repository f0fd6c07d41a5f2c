// window_refinement on the CPU, for the instruction set of the including translation unit.
//
// Forward: a task is a window, or one head of it where there are few windows; tasks write different cells or channels.
// Backward: a task is a group of heads in a run of consecutive windows, which it visits in order, adding up its share of
// the bias gradient. Runs and groups depend on the sizes alone, and the runs are added in order at the end, so the
// result does not depend on the number of threads.
#pragma once

#include "window_refinement_attention.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

constexpr int64_t kTasks = 64;               // of a backward, about: enough to share out among threads
constexpr int64_t kBiasGradBytes = 4 << 20;  // what the bias gradients of all runs take, about

// The bias table, laid out once for all windows.
template <class T>
void lay_out_biases(const WindowTiling<T>& tiling, const WindowShape& s, const void* table, T* to) {
  const int64_t size = tiling.rows() * tiling.kLanes;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
  for (int64_t h = 0; h < s.heads; ++h) lay_out_bias(tiling, static_cast<const T*>(table) + h, s.heads, to + h * size);
}

// A contiguous (B, height, width, channels) map, from the first cell of a window.
template <class In>
Grid<In> window_of(const WindowShape& s, void* map, int64_t channels, const Window& at) {
  In* data = static_cast<In*>(map) + ((at.batch * s.height + at.r) * s.width + at.c) * channels;
  return {data, s.width * channels, channels};
}

template <class In>
Grid<const In> window_of(const Cells& map, const Window& at) {
  return {map.at<In>(at.batch, at.r, at.c), map.row, map.cell};
}

// q, k and v, from the first element of a head's q.
template <class In>
WindowInputs<In> inputs(Grid<const In> q, int64_t channels) {
  return {q, q + channels, q + 2 * channels};
}

template <class In, class T>
int forward(const WindowForward& op) {
  const WindowShape& s = op.shape;
  const WindowTiling<T> tiling(s.window);
  const WindowGrid windows(s);
  const int64_t channels = s.heads * s.head_width, bias_size = tiling.rows() * tiling.kLanes;
  Buffer<T> bias(s.heads * bias_size);
  if (bias.failed()) return kOutOfMemory;
  lay_out_biases(tiling, s, op.table, bias.get());
  const int64_t parts = windows.count() >= 8 * s.threads ? 1 : s.heads;
  int status = kDone;
#pragma omp parallel num_threads(s.threads)
  {
    WindowAttention<In, T> attention(tiling, s.heads, s.head_width, s.scale);
    if (attention.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < windows.count() * parts; ++task) {
      if (attention.failed()) continue;
      const Window at = windows[task / parts];
      const Grid<const In> qkv = window_of<In>(op.qkv, at);
      const Grid<In> out = window_of<In>(s, op.out, channels, at);
      const int64_t first = parts == 1 ? 0 : task % parts, last = parts == 1 ? s.heads : first + 1;
      for (int64_t h = first; h < last; h += attention.heads()) {
        const int64_t heads = last - h < attention.heads() ? last - h : attention.heads();
        attention.run(at.rows, at.columns, heads, inputs(qkv + h * s.head_width, channels), bias.get() + h * bias_size,
                      out + h * s.head_width);
      }
    }
  }
  return status;
}

template <class In, class T>
int backward(const WindowBackward& op) {
  const WindowShape& s = op.shape;
  const WindowTiling<T> tiling(s.window);
  const WindowGrid windows(s);
  const int64_t channels = s.heads * s.head_width, bias_size = tiling.rows() * tiling.kLanes;
  int64_t runs = kBiasGradBytes / (s.heads * bias_size * int64_t(sizeof(T)));
  runs = runs < 1 ? 1 : runs < kTasks ? runs : kTasks;
  runs = runs < windows.count() ? runs : windows.count();
  const int64_t group = (s.heads * runs + kTasks - 1) / kTasks, groups = (s.heads + group - 1) / group;
  Buffer<T> bias(s.heads * bias_size), grad_bias(runs * s.heads * bias_size);
  if (bias.failed() || grad_bias.failed()) return kOutOfMemory;
  lay_out_biases(tiling, s, op.table, bias.get());
  int status = kDone;
#pragma omp parallel num_threads(s.threads)
  {
    WindowAttentionBackward<In, T> attention(tiling, group, s.head_width, s.scale);
    if (attention.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < runs * groups; ++task) {
      if (attention.failed()) continue;
      const int64_t run = task / groups, first = task % groups * group;
      const int64_t last = first + group < s.heads ? first + group : s.heads;
      T* grad = grad_bias.get() + run * s.heads * bias_size;
      for (int64_t i = first * bias_size; i < last * bias_size; ++i) grad[i] = 0;
      for (int64_t i = windows.count() * run / runs; i < windows.count() * (run + 1) / runs; ++i) {
        const Window at = windows[i];
        const Grid<const In> qkv = window_of<In>(op.qkv, at), grad_out = window_of<In>(op.grad_out, at);
        const Grid<In> grad_qkv = window_of<In>(s, op.grad_qkv, 3 * channels, at);
        for (int64_t h = first; h < last; h += attention.heads()) {
          const int64_t heads = last - h < attention.heads() ? last - h : attention.heads();
          const Grid<In> grad_q = grad_qkv + h * s.head_width;
          attention.run(at.rows, at.columns, heads, inputs(qkv + h * s.head_width, channels),
                        grad_out + h * s.head_width, bias.get() + h * bias_size, grad_q, grad_q + channels,
                        grad_q + 2 * channels, grad + h * bias_size);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t h = 0; h < s.heads; ++h) {
      T* total = grad_bias.get() + h * bias_size;
      for (int64_t run = 1; run < runs; ++run) {
        const T* more = total + run * s.heads * bias_size;
        for (int64_t i = 0; i < bias_size; ++i) total[i] += more[i];
      }
      gather_bias(tiling, total, s.heads, static_cast<T*>(op.grad_table) + h);
    }
  }
  return status;
}

inline int window_refinement_forward(const WindowForward& op) {
  return by_type(op.shape.dtype, [&](auto element, auto exact) {
    return forward<decltype(element), decltype(exact)>(op);
  });
}

inline int window_refinement_backward(const WindowBackward& op) {
  return by_type(op.shape.dtype, [&](auto element, auto exact) {
    return backward<decltype(element), decltype(exact)>(op);
  });
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
