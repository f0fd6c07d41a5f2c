// window_stage on the CPU, for the instruction set of the including translation unit.
//
// The weights are packed once a call and stay in the second cache, all threads reading the same. A task is a few
// neighbouring windows, up to 256 cells: their q, k and v stay in the cache until the attention has used them, and the
// rest of the layers is done on blocks of rows, from the attention's output to the map's.
#pragma once

#include "../cpu/layers.h"
#include "../window_refinement/window_refinement_cpu.h"
#include "window_stage.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

constexpr int64_t kStageCells = 256;  // of a task, at most
constexpr int64_t kStageTasks = 64;   // about, where they would be few: enough to share out among threads
constexpr int64_t kStageRows = 48;  // rows of one block: hidden activations of 48 x 384 float32 are 72 KB

// The layers with their weights packed, shared by all threads.
template <class T>
class StageLayers {
 public:
  explicit StageLayers(const WindowStage& op)
      : norm1{norm(op.norm1, op.eps)},
        norm2{norm(op.norm2, op.eps)},
        norm_out{norm(op.norm_out, op.eps)},
        channels(op.shape.heads * op.shape.head_width),
        qkv{channels, 3 * channels, nullptr, nullptr},
        proj{channels, channels, nullptr, nullptr},
        fc1{channels, op.hidden, nullptr, nullptr},
        fc2{op.hidden, channels, nullptr, nullptr},
        memory_(qkv.size() + proj.size() + fc1.size() + fc2.size()) {
    if (!failed()) fc2.place(fc1.place(proj.place(qkv.place(memory_.get()))));
  }

  bool failed() const { return memory_.failed(); }

  void pack(const WindowStage& op) {
    const struct {
      Linear<T>& to;
      const LayerWeights& from;
    } layers[] = {{qkv, op.qkv}, {proj, op.proj}, {fc1, op.fc1}, {fc2, op.fc2}};
    for (const auto& layer : layers) {
      const T *weight = static_cast<const T*>(layer.from.weight), *bias = static_cast<const T*>(layer.from.bias);
#pragma omp parallel for num_threads(op.shape.threads)
      for (int64_t panel = 0; panel < layer.to.panels(); ++panel) layer.to.pack(panel, weight, bias);
    }
  }

  LayerNorm<T> norm1, norm2, norm_out;
  const int64_t channels;
  Linear<T> qkv, proj, fc1, fc2;

 private:
  static LayerNorm<T> norm(const LayerWeights& of, double eps) {
    return {static_cast<const T*>(of.weight), static_cast<const T*>(of.bias), T(eps)};
  }

  Buffer<T> memory_;
};

// What one thread needs for its tasks.
template <class T>
class StageTask {
 public:
  using Vec = typename Simd<T>::Vec;
  static constexpr int64_t kLanes = Simd<T>::kLanes;

  StageTask(const WindowStage& op, const StageLayers<T>& layers, const WindowTiling<T>& tiling, const T* bias,
            int64_t windows)
      : op_(op),
        layers_(layers),
        tiling_(tiling),
        bias_(bias),
        channels_(layers.channels),
        row_(padded<T>(channels_)),
        qkv_row_(padded<T>(3 * channels_)),
        attention_(tiling, op.shape.heads, op.shape.head_width, op.shape.scale),
        from_(windows * tiling.cells()),
        to_(windows * tiling.cells()),
        scratch_(windows * tiling.cells() * (qkv_row_ + row_) + kStageRows * (2 * row_ + padded<T>(op.hidden))) {
    qkv_ = scratch_.get();
    attended_ = qkv_ + windows * tiling.cells() * qkv_row_;
    normed_ = attended_ + windows * tiling.cells() * row_;
    sums_ = normed_ + kStageRows * row_;
    hidden_ = sums_ + kStageRows * row_;
  }

  bool failed() const {
    return attention_.failed() || from_.failed() || to_.failed() || scratch_.failed();
  }

  // Windows [first, last) of the grid; total and highest are the statistics of their cells.
  void run(const WindowGrid& grid, int64_t first, int64_t last, T* total, T* highest) {
    cells_ = 0;
    for (int64_t i = first; i < last; ++i) note_cells(grid[i]);
    for (int64_t start = 0; start < cells_; start += kStageRows) {
      const int64_t rows = block(start);
      for (int64_t i = 0; i < rows; ++i) layers_.norm1.run(channels_, from_.get()[start + i], normed_ + i * row_);
      layers_.qkv.run(rows, normed_, qkv_ + start * qkv_row_);
    }
    int64_t cell = 0;
    for (int64_t i = first; i < last; ++i) {
      const Window at = grid[i];
      attend(at, cell);
      cell += at.rows * at.columns;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      total[c] = 0;
      highest[c] = -__builtin_huge_val();
    }
    for (int64_t start = 0; start < cells_; start += kStageRows) finish(start, block(start), total, highest);
  }

 private:
  int64_t block(int64_t start) const { return cells_ - start < kStageRows ? cells_ - start : kStageRows; }

  // Appends the cells of a window: where each is read and written.
  void note_cells(const Window& at) {
    const WindowShape& s = op_.shape;
    for (int64_t r = at.r; r < at.r + at.rows; ++r) {
      for (int64_t c = at.c; c < at.c + at.columns; ++c, ++cells_) {
        from_.get()[cells_] = op_.x.at<T>(at.batch, r, c);
        to_.get()[cells_] = static_cast<T*>(op_.out) + ((at.batch * s.height + r) * s.width + c) * channels_;
      }
    }
  }

  void attend(const Window& at, int64_t cell) {
    const WindowShape& s = op_.shape;
    const Grid<const T> qkv{qkv_ + cell * qkv_row_, at.columns * qkv_row_, qkv_row_};
    const Grid<T> out{attended_ + cell * row_, at.columns * row_, row_};
    for (int64_t h = 0; h < s.heads; h += attention_.heads()) {
      const int64_t heads = s.heads - h < attention_.heads() ? s.heads - h : attention_.heads();
      attention_.run(at.rows, at.columns, heads, inputs(qkv + h * s.head_width, channels_),
                     bias_ + h * tiling_.rows() * kLanes, out + h * s.head_width);
    }
  }

  // From the attention's output to the map.
  void finish(int64_t start, int64_t rows, T* total, T* highest) {
    layers_.proj.run(rows, attended_ + start * row_, sums_);
    for (int64_t i = 0; i < rows; ++i) {
      const T* x = from_.get()[start + i];
      T* y = sums_ + i * row_;
      for (int64_t c = 0; c < channels_; ++c) y[c] += x[c];
      layers_.norm2.run(channels_, y, normed_ + i * row_);
    }
    layers_.fc1.run(rows, normed_, hidden_);
    for (int64_t i = 0; i < rows * padded<T>(op_.hidden); i += kLanes) store(hidden_ + i, gelu(load(hidden_ + i)));
    layers_.fc2.template run<true>(rows, hidden_, sums_);
    for (int64_t i = 0; i < rows; ++i) {
      const T* x = from_.get()[start + i];
      T* out = to_.get()[start + i];
      layers_.norm_out.run(channels_, sums_ + i * row_, out);
      for (int64_t c = 0; c < channels_; ++c) {
        const T value = x[c] + out[c];
        out[c] = value;
        total[c] += value;
        highest[c] = value > highest[c] || value != value ? value : highest[c];
      }
    }
  }

  const WindowStage& op_;
  const StageLayers<T>& layers_;
  const WindowTiling<T>& tiling_;
  const T* bias_;
  const int64_t channels_, row_, qkv_row_;
  WindowAttention<T, T> attention_;
  Buffer<const T*> from_;
  Buffer<T*> to_;
  Buffer<T> scratch_;
  T *qkv_ = nullptr, *attended_ = nullptr, *normed_ = nullptr, *sums_ = nullptr, *hidden_ = nullptr;
  int64_t cells_ = 0;
};

template <class T>
int window_stage_of(const WindowStage& op) {
  const WindowShape& s = op.shape;
  const WindowTiling<T> tiling(s.window);
  const WindowGrid grid(s);
  StageLayers<T> layers(op);
  const int64_t channels = layers.channels;
  const int64_t windows = grid.count() / s.batch;  // of one map
  const int64_t fit = kStageCells / tiling.cells(), share = (grid.count() + kStageTasks - 1) / kStageTasks;
  int64_t together = fit < share ? fit : share;
  together = together < 1 ? 1 : together < windows ? together : windows;
  const int64_t tasks = (windows + together - 1) / together;  // of one map
  Buffer<T> bias(s.heads * tiling.rows() * tiling.kLanes), statistics(s.batch * tasks * 2 * channels);
  if (layers.failed() || bias.failed() || statistics.failed()) return kOutOfMemory;
  layers.pack(op);
  lay_out_biases(tiling, s, op.table, bias.get());
  int status = kDone;
#pragma omp parallel num_threads(s.threads)
  {
    StageTask<T> task(op, layers, tiling, bias.get(), together);
    if (task.failed()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < s.batch * tasks; ++i) {
      if (task.failed()) continue;
      const int64_t first = i / tasks * windows + i % tasks * together, end = (i / tasks + 1) * windows;
      T* total = statistics.get() + i * 2 * channels;
      task.run(grid, first, first + together < end ? first + together : end, total, total + channels);
    }
  }
  if (status != kDone) return status;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* of = statistics.get() + b * tasks * 2 * channels + c;
      double total = 0;
      T highest = of[channels];
      for (int64_t i = 0; i < tasks; ++i, of += 2 * channels) {
        total += of[0];
        highest = of[channels] > highest || of[channels] != of[channels] ? of[channels] : highest;
      }
      static_cast<T*>(op.mean)[b * channels + c] = T(total / double(s.height * s.width));
      static_cast<T*>(op.highest)[b * channels + c] = highest;
    }
  }
  return kDone;
}

inline int window_stage(const WindowStage& op) {
  return op.shape.dtype == Dtype::kFloat64 ? window_stage_of<double>(op) : window_stage_of<float>(op);
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
