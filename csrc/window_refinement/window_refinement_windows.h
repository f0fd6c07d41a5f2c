// How a map is cut into windows; for the CPU and for CUDA devices.
//
// The namespace is that of the instruction set, so that no two of them share a copy; CUDA code has one of its own.
#pragma once

#include "../common/hostdevice.h"
#include "window_refinement.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

// One axis of the map, cut into windows.
struct WindowAxis {
  int64_t side, window, shift;

  LPMFLOW_HOST_DEVICE int64_t count() const {
    const int64_t rest = side > shift ? side - shift : 0;
    return (shift > 0 && side > 0 ? 1 : 0) + (rest + window - 1) / window;
  }
  LPMFLOW_HOST_DEVICE int64_t start(int64_t i) const {
    return shift == 0 ? i * window : i == 0 ? 0 : shift + (i - 1) * window;
  }
  LPMFLOW_HOST_DEVICE int64_t length(int64_t i) const {
    const int64_t whole = shift > 0 && i == 0 ? shift : window, left = side - start(i);
    return left < whole ? left : whole;
  }
};

// One window: where it lies, and how large it is.
struct Window {
  int64_t batch, r, c, rows, columns;
};

struct WindowGrid {
  WindowAxis vertical, horizontal;
  int64_t batch;

  LPMFLOW_HOST_DEVICE explicit WindowGrid(const WindowShape& s)
      : vertical{s.height, s.window, s.shift}, horizontal{s.width, s.window, s.shift}, batch(s.batch) {}

  LPMFLOW_HOST_DEVICE int64_t count() const { return batch * vertical.count() * horizontal.count(); }
  LPMFLOW_HOST_DEVICE Window operator[](int64_t i) const {
    const int64_t across = horizontal.count(), down = vertical.count();
    const int64_t x = i % across, y = i / across % down;
    return {i / across / down, vertical.start(y), horizontal.start(x), vertical.length(y), horizontal.length(x)};
  }
};

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
