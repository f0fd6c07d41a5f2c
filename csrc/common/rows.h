// A (batch, heads, tokens, width) tensor whose last dimension is dense: where it begins and how far apart its rows are.
#pragma once

#include <cstdint>

namespace lpmflow {

struct Rows {
  const void* data = nullptr;  // null: the tensor is absent
  int64_t batch = 0, head = 0, token = 0;  // strides in elements

  // Always inlined: this header is compiled for several instruction sets, which must not share one copy.
  template <class T>
  __attribute__((always_inline)) const T* row(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(data) + b * batch + h * head + i * token;
  }
};

}  // namespace lpmflow
