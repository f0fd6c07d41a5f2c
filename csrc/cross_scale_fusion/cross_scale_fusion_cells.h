// Where the CUDA cross_scale_fusion finds what an output cell is made of; for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/hostdevice.h"
#include "cross_scale_fusion.h"

namespace lpmflow {

// A product that no compiler contracts with the sum around it.
LPMFLOW_HOST_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// The two input places that an output place lies between.
struct Tap {
  int low, high;
  float share;  // of high
};

// One axis of bilinear interpolation, `align_corners`, with the rounding of PyTorch's. Every place of an axis that keeps
// its length, and the last of any, is its own neighbour.
struct Axis {
  int in, out;
  float step;

  LPMFLOW_HOST_DEVICE Axis(int64_t in_, int64_t out_)
      : in(static_cast<int>(in_)),
        out(static_cast<int>(out_)),
        step(out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f) {}

  LPMFLOW_HOST_DEVICE Tap at(int i) const {
    if (in == out) return {i, i, 0.0f};
    const float place = rounded_product(step, static_cast<float>(i));
    const int before = static_cast<int>(place), low = before < in ? before : in - 1;
    return {low, low + 1 < in ? low + 1 : low, place - static_cast<float>(low)};
  }
};

// (1 - share) a + share b, infinities and NaN included, written so that equal values give that very value: a constant row
// stays constant, however large it is.
LPMFLOW_HOST_DEVICE float between(float a, float b, float share) {
  return fmaf(share, fabsf(a) == INFINITY ? b : b - a, a);
}

// Whether a scale has the coarse lines that the output lines lie between and, where it is not interpolated, no others.
inline bool lines_fit(const FusionScale& scale, int64_t h, int64_t w, int64_t first_row, int64_t rows) {
  if (scale.hs == h && scale.ws == w) return scale.first_line == first_row && scale.lines == rows;
  const Axis lines(scale.hs, h);
  return lines.at(static_cast<int>(first_row)).low >= scale.first_line &&
         lines.at(static_cast<int>(first_row + rows - 1)).high < scale.first_line + scale.lines;
}

// What a warp computes: output cell (r, c) of batch element b in scale s of the launch.
struct FusionCell {
  int64_t s, b, r, c;
};

LPMFLOW_HOST_DEVICE FusionCell fusion_cell(int64_t index, int64_t batch, int64_t rows, int64_t w) {
  return {index / (w * rows * batch), index / (w * rows) % batch, index / w % rows, index % w};
}

// How a launch is cut into blocks of warps, and what shared memory a warp has: the blended row, where it fits.
struct FusionBlocks {
  static constexpr int kMostWarps = 4, kSharedFloats = 12 * 1024;  // 48 KB: what needs no asking

  int64_t row;  // values of the largest coarse target grid

  LPMFLOW_HOST_DEVICE bool staged() const { return row <= kSharedFloats; }
  LPMFLOW_HOST_DEVICE int warps() const {
    const int64_t fit = staged() ? kSharedFloats / row : kMostWarps;
    return static_cast<int>(fit < kMostWarps ? fit : kMostWarps);
  }
};

}  // namespace lpmflow
