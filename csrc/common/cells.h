// A (batch, height, width, channels) map whose last dimension is dense: where it begins and how far apart its cells are.
#pragma once

#include <cstdint>

namespace lpmflow {

struct Cells {
  const void* data = nullptr;
  int64_t batch = 0, row = 0, cell = 0;  // strides in elements

  // Always inlined: this header is compiled for several instruction sets, which must not share one copy.
  template <class T>
  __attribute__((always_inline)) const T* at(int64_t b, int64_t r, int64_t c) const {
    return static_cast<const T*>(data) + b * batch + r * row + c * cell;
  }
};

}  // namespace lpmflow
