// The element types of tensors. The 16-bit ones are read and written one by one, never computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dtype.h"
#include "../common/status.h"
#include "simd.h"

#if defined(__FLT16_MANT_DIG__)
#define LPMFLOW_HAS_FLOAT16 1
#else
#define LPMFLOW_HAS_FLOAT16 0
#endif

namespace lpmflow {
namespace LPMFLOW_ISA {

#if LPMFLOW_HAS_FLOAT16
using Float16 = _Float16;
#endif

// The upper half of a float32; rounds to nearest, ties to even.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? uint16_t((word >> 16) | 0x40) : uint16_t((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

// run(element, exact): two values of the types of `dtype` and of what its sums are formed in; their types are what counts.
template <class Run>
int by_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32: return run(float{}, float{});
    case Dtype::kFloat64: return run(double{}, double{});
    case Dtype::kBFloat16: return run(BFloat16{}, float{});
    case Dtype::kFloat16:
#if LPMFLOW_HAS_FLOAT16
      return run(Float16{}, float{});
#else
      break;
#endif
  }
  return kNoFloat16;
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
