// Layers of a network on rows in the cache: linear, layer normalisation, GELU.
//
// A row of n elements is stored as padded(n). What lies behind the n is never read; a linear layer leaves zeros there.
#pragma once

#include "gemm.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

// A linear layer, packed: weight (inputs, padded(outputs)) in panels, bias (padded(outputs)).
template <class T>
struct Linear {
  int64_t inputs, outputs;
  T *weight, *bias;

  int64_t panels() const { return padded<T>(outputs) / kPanel<T>; }
  int64_t size() const { return (inputs + 1) * padded<T>(outputs); }

  // Takes its memory from `at`.
  T* place(T* at) {
    weight = at;
    bias = at + inputs * padded<T>(outputs);
    return at + size();
  }

  // One panel of outputs, from a (outputs, inputs) matrix and its (outputs) bias.
  void pack(int64_t panel, const T* from, const T* from_bias) {
    const int64_t first = panel * kPanel<T>;
    const int64_t count = outputs - first < kPanel<T> ? outputs - first : kPanel<T>;
    pack_columns<T>(from + first * inputs, inputs, count, inputs, weight + first * inputs);
    for (int64_t j = 0; j < kPanel<T>; ++j) bias[first + j] = j < count ? from_bias[first + j] : T(0);
  }

  // y (rows, padded(outputs)) = or += x W + bias, x with rows of padded(inputs).
  template <bool kAdd = false>
  void run(int64_t rows, const T* x, T* y) const {
    using Vec = typename Simd<T>::Vec;
    const int64_t row = padded<T>(outputs);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < row; j += Simd<T>::kLanes) {
        const Vec first = load(bias + j);
        store(y + i * row + j, kAdd ? load(y + i * row + j) + first : first);
      }
    }
    multiply<T, true>(rows, outputs, inputs, {x, padded<T>(inputs), 1}, weight, y, row);
  }
};

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// (x - mean) / sqrt(variance + eps) weight + bias over n elements.
template <class T>
struct LayerNorm {
  const T *weight, *bias;
  T eps;

  void run(int64_t n, const T* x, T* y) const {
    using Vec = typename Simd<T>::Vec;
    constexpr int64_t kLanes = Simd<T>::kLanes;
    const int64_t whole = n / kLanes * kLanes;
    Vec sums = {};
    for (int64_t j = 0; j < whole; j += kLanes) sums += load(x + j);
    T mean = sum<T>(sums);
    for (int64_t j = whole; j < n; ++j) mean += x[j];
    mean /= T(n);
    Vec squares = {};
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec centred = load(x + j) - mean;
      squares += centred * centred;
    }
    T variance = sum<T>(squares);
    for (int64_t j = whole; j < n; ++j) variance += (x[j] - mean) * (x[j] - mean);
    const T factor = T(1) / square_root(variance / T(n) + eps);
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(y + j, (load(x + j) - mean) * factor * load(weight + j) + load(bias + j));
    }
    for (int64_t j = whole; j < n; ++j) y[j] = (x[j] - mean) * factor * weight[j] + bias[j];
  }
};

// x Phi(x), Phi(x) = erfc(-x / sqrt 2) / 2, to about 1e-7 of the larger of 1 and the result.
//
// erfc(z) = e^(-z^2) t P(t) for z >= 0 with t = 1 / (1 + 0.3 z): P fitted to 2e-8 for z up to 10, beyond which e^(-z^2)
// is below what a float holds. No difference of near numbers is taken, so the tail of negative x is exact too.
inline FloatVec gelu(FloatVec x) {
  const FloatVec zero = {};
  const FloatVec z = (x < zero ? -x : x) * 0.70710678f;
  const FloatVec t = 1.0f / (1.0f + 0.3f * z);
  constexpr float kFit[] = {0.169188008f,   0.170715213f, 0.148339272f,  0.214925647f, -0.0946497396f,
                            0.547718585f, -0.512276769f, 0.485562563f, -0.129522771f};
  FloatVec p = zero + kFit[8];
#pragma GCC unroll 8
  for (int k = 7; k >= 0; --k) p = p * t + kFit[k];
  const FloatVec half = 0.5f * t * p * exp_nonpositive<float>(-z * z);
  return x * (x < zero ? half : 1.0f - half);
}

inline DoubleVec gelu(DoubleVec x) {
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane) {
    x[lane] *= 0.5 * __builtin_erfc(-x[lane] * 0.70710678118654752440);
  }
  return x;
}

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
