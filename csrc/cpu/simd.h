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
  using Index = int32_t;
  static constexpr int kLanes = LPMFLOW_VECTOR_BYTES / 4;
  static constexpr int kMantissa = 23;
  static constexpr float kBias = 127, kRound = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  // 2^f for |f| <= 1/2, to 5e-9: through 1 at 0, interpolated at Chebyshev's nodes.
  static constexpr float kPower[] = {1, 0.69314718802622878f,  0.24022650760568127f,   0.055503571142190779f,
                                     0.0096180825572778515f, 0.0013390863364671234f, 0.00015453162945120690f};
};

template <>
struct Simd<double> {
  using Vec = DoubleVec;
  using Bits = LongVec;
  using Index = int64_t;
  static constexpr int kLanes = LPMFLOW_VECTOR_BYTES / 8;
  static constexpr int kMantissa = 52;
  static constexpr double kBias = 1023, kRound = 6755399441055744;  // 1.5 * 2^52
  // To 9e-18.
  static constexpr double kPower[] = {1,
                                      0.69314718055994530942,
                                      0.24022650695910098220,
                                      0.055504108664821594339,
                                      0.0096181291076068885273,
                                      0.0013333558146416935310,
                                      0.00015403530441736050155,
                                      1.5252733829836118394e-5,
                                      1.3215442587921689653e-6,
                                      1.0178062445845773521e-7,
                                      7.0725859492692236999e-9,
                                      4.4549605981865183938e-10};
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

// The lanes of x at `places`.
template <class T>
inline typename Simd<T>::Vec pick(typename Simd<T>::Vec x, typename Simd<T>::Bits places) {
#if defined(__clang__)
  typename Simd<T>::Vec picked;
  for (int lane = 0; lane < Simd<T>::kLanes; ++lane) picked[lane] = x[places[lane]];
  return picked;
#else
  return __builtin_shuffle(x, places);
#endif
}

// In halves, as a tree.
template <class T>
inline T sum(typename Simd<T>::Vec x) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    typename Simd<T>::Bits other;
    for (int lane = 0; lane < kLanes; ++lane) other[lane] = lane ^ half;
    x += pick<T>(x, other);
  }
  return x[0];
}

// 2^x for x <= 0; 0 where the result would not be a normal number; NaN stays NaN.
//
// x = n + f with |f| <= 1/2; 2^f is a polynomial, and 2^n has n + bias for its exponent bits, which is what the low bits
// of x + kRound + kBias hold. At the lower bound those bits are 0, and so is the factor.
template <class T>
inline typename Simd<T>::Vec exp2_nonpositive(typename Simd<T>::Vec x) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  typename S::Bits bits;
  const Vec zero = {}, lowest = zero - S::kBias;
  const Vec bounded = lowest > x ? lowest : x;  // x where it is NaN
  const Vec shifted = bounded + (S::kRound + S::kBias);
  const Vec f = bounded - (shifted - (S::kRound + S::kBias));
  constexpr int kDegree = sizeof(S::kPower) / sizeof(T) - 1;
  Vec p = zero + S::kPower[kDegree];
#pragma GCC unroll 16
  for (int k = kDegree - 1; k >= 0; --k) p = p * f + S::kPower[k];
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= S::kMantissa;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

constexpr double kLog2E = 1.44269504088896340736;

template <class T>
inline typename Simd<T>::Vec exp_nonpositive(typename Simd<T>::Vec x) {
  return exp2_nonpositive<T>(x * T(kLog2E));
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
