// Vectors of the instruction set this translation unit is compiled for, and the few functions on them.
//
// Everything here and in the files that include it lives in a namespace named after the instruction set (LPMFLOW_ISA),
// because the same source is compiled once for each: two copies of one inline function, compiled for different
// machines, must not share a name. For the same reason no standard library template is used in these files.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(LPMFLOW_ISA) || !defined(LPMFLOW_VECTOR_BYTES) || !defined(LPMFLOW_TILE_ROWS)
#error "define LPMFLOW_ISA, LPMFLOW_VECTOR_BYTES and LPMFLOW_TILE_ROWS before including this file"
#endif

namespace lpmflow {
namespace LPMFLOW_ISA {

typedef float FloatVec __attribute__((vector_size(LPMFLOW_VECTOR_BYTES)));
typedef double DoubleVec __attribute__((vector_size(LPMFLOW_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(LPMFLOW_VECTOR_BYTES)));
typedef int64_t LongVec __attribute__((vector_size(LPMFLOW_VECTOR_BYTES)));

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Vec = FloatVec;
  using Bits = IntVec;
  static constexpr int kLanes = LPMFLOW_VECTOR_BYTES / 4;
  static constexpr int kMantissa = 23;
  static constexpr int kTaylor = 7;  // r^8 / 8! < 6e-9 for |r| <= ln 2 / 2
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.3f;  // e^x is normal above
};

template <>
struct Simd<double> {
  using Vec = DoubleVec;
  using Bits = LongVec;
  static constexpr int kLanes = LPMFLOW_VECTOR_BYTES / 8;
  static constexpr int kMantissa = 52;
  static constexpr int kTaylor = 13;  // r^14 / 14! < 5e-18
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -708.3;
};

template <class T>
inline typename Simd<T>::Vec load(const T* from) {
  typename Simd<T>::Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
inline void store(T* to, typename Simd<T>::Vec x) {
  std::memcpy(to, &x, sizeof x);
}

// In halves, as a tree.
template <class T>
inline T sum(typename Simd<T>::Vec x) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    typename Simd<T>::Bits other;
    for (int lane = 0; lane < kLanes; ++lane) other[lane] = lane ^ half;
    x += __builtin_shuffle(x, other);
  }
  return x[0];
}

constexpr double reciprocal_factorial(int n) { return n < 2 ? 1.0 : reciprocal_factorial(n - 1) / n; }

// e^x for x <= 0, to about one unit in the last place; 0 where the result would not be a normal number; NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series; 2^n by adding n to the exponent bits. The low bits of
// x / ln 2 + kRound hold n as an integer.
template <class T>
inline typename Simd<T>::Vec exp_nonpositive(typename Simd<T>::Vec x) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  using Bits = typename S::Bits;
  const Vec zero = {};
  const Vec bounded = x < zero + S::kLowest ? zero + S::kLowest : x;
  const Vec shifted = bounded * T(1.44269504088896340736) + S::kRound;
  const Vec n = shifted - S::kRound;
  const Vec r = (bounded - n * S::kLn2High) - n * S::kLn2Low;
  Vec p = zero + T(reciprocal_factorial(S::kTaylor));
#pragma GCC unroll 16
  for (int k = S::kTaylor - 1; k >= 0; --k) p = p * r + T(reciprocal_factorial(k));
  Bits exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << S::kMantissa;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  const Vec flushed = x < zero + S::kLowest ? zero : result;
  return x == x ? flushed : x;  // the arithmetic on the bits may have made a number of a NaN
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
