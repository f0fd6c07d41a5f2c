// A (batch, heads, tokens, width) tensor whose last dimension is dense: where it begins and how far apart its rows are.
#pragma once

#include <cstdint>

namespace lpmflow {

struct Rows {
  const void* data = nullptr;  // null: the tensor is absent
  int64_t batch = 0, head = 0, token = 0;  // strides in elements

  template <class T>
  const T* row(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(data) + b * batch + h * head + i * token;
  }
};

}  // namespace lpmflow
