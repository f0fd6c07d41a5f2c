// The 16-bit element types of tensors: read and written one by one, never computed in.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
