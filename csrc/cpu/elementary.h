// exp, the logistic function and the normal distribution, without branches and calls, so that the compiler vectorises
// loops over them. In float64, where speed matters less, they use the standard library.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace safe_kernels::cpu {

SAFE_KERNELS_INLINE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

SAFE_KERNELS_INLINE float from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// min(|x|, bound), where a NaN counts as large. The bits are compared as integers, which have the same order for
// non-negative numbers: for two float comparisons GCC would compute every outcome and blend them.
SAFE_KERNELS_INLINE float magnitude(float x, float bound) {
  const int32_t bits = bits_of(x) & 0x7FFFFFFF, limit = bits_of(bound);
  return from_bits(bits < limit ? bits : limit);
}

// exp(x) to about one ulp, for x from -95 to 88.5: x = n ln 2 + r with |r| <= ln(2) / 2, exp(r) by a polynomial
// (minimax, 3e-9), 2^n by its bits. Results below 2^-126.5 become 0 and from 2^127.5 infinity, which changes no
// caller's result.
SAFE_KERNELS_INLINE float exponential_inside(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
  constexpr int32_t kRoundBits = 0x4B400000;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first of few bits
  float p = 0.00138145761f;
  p = p * r + 0.00836872749f;
  p = p * r + 0.0416683891f;
  p = p * r + 0.166665205f;
  p = p * r + 0.499999934f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = bits_of(shifted) - (kRoundBits - 127);  // 255 is infinity; below 1 becomes 0
  return p * from_bits((exponent > 0 ? exponent : 0) << 23);
}

// For any x. exp(NaN) is a number here: callers get the NaN into their result in another way.
SAFE_KERNELS_INLINE float exponential(float x) { return exponential_inside(std::copysign(magnitude(x, 88.5f), x)); }

SAFE_KERNELS_INLINE double exponential(double x) { return std::exp(x); }

template <typename T>
SAFE_KERNELS_INLINE T logistic(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// The standard normal distribution function at x, and its density.
template <typename T>
struct Normal {
  T cdf, density;
};

// cdf(-a) = exp(-a^2 / 2) R(a), with R rational (minimax, 5e-9): both results use one exponential, and the lower tail
// stays precise, which 1 + erf(x / sqrt 2) loses to cancellation.
SAFE_KERNELS_INLINE Normal<float> normal(float x) {
  const float a = magnitude(x, 13.5f);  // exp(-a^2 / 2) is already 0 here
  float numerator = 0.00403694041f;
  numerator = numerator * a + 0.0400976972f;
  numerator = numerator * a + 0.181644796f;
  numerator = numerator * a + 0.436144917f;
  numerator = numerator * a + 0.5f;
  float denominator = 0.0101189701f;
  denominator = denominator * a + 0.100517231f;
  denominator = denominator * a + 0.465272482f;
  denominator = denominator * a + 1.19589201f;
  denominator = denominator * a + 1.67017476f;
  denominator = denominator * a + 1.0f;
  const float e = exponential_inside(-0.5f * (a * a));
  const float tail = e * (numerator / denominator);
  const float rest = 1.0f - tail;
  return {x < 0.0f ? tail : rest, e * 0.398942280f};
}

SAFE_KERNELS_INLINE Normal<double> normal(double x) {
  return {0.5 * std::erfc(-0.70710678118654752440 * x), std::exp(-0.5 * x * x) * 0.39894228040143267794};
}

}  // namespace safe_kernels::cpu
