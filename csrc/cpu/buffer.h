// Scratch memory, aligned to a cache line and freed at the end of its scope.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }  // null when there was no memory
  bool failed() const { return data_ == nullptr; }

 private:
  T* data_;
};

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
