// exp, the logistic function and the normal distribution, written so that a loop over them becomes vector code: no
// branch, no call. In float64, where speed matters less, they are the standard library's.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace safe_kernels::cpu {

// exp(x) to about an ulp: x = n ln 2 + r with |r| <= ln(2) / 2, exp(r) by a polynomial (minimax, 3e-9), 2^n by its
// bits. Below 2^-126.5 it is 0 and from 2^127.5 it is infinity, which no caller can tell from the truth.
SAFE_KERNELS_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
  x = x < -88.0f ? -88.0f : x;           // a NaN compares false, and stays
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first of few bits
  float p = 0.00138145761f;
  p = p * r + 0.00836872749f;
  p = p * r + 0.0416683891f;
  p = p * r + 0.166665205f;
  p = p * r + 0.499999934f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);  // n = -127 gives 0, n = 128 infinity
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

SAFE_KERNELS_INLINE double exponential(double x) { return std::exp(x); }

template <typename T>
SAFE_KERNELS_INLINE T logistic(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// The standard normal distribution up to x, and its density there.
template <typename T>
struct Normal {
  T cdf, density;
};

// cdf(-a) = exp(-a^2 / 2) R(a), with R rational (minimax, 5e-9): one exponential serves both, and the lower tail, which
// 1 + erf(x / sqrt 2) loses to cancellation, keeps its digits.
SAFE_KERNELS_INLINE Normal<float> normal(float x) {
  float a = std::fabs(x);
  a = a > 14.0f ? 14.0f : a;  // exp(-98) is 0 already
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
  const float e = exponential(-0.5f * (a * a));
  const float tail = e * (numerator / denominator);
  const float rest = 1.0f - tail;
  return {x < 0.0f ? tail : rest, e * 0.398942280f};
}

SAFE_KERNELS_INLINE Normal<double> normal(double x) {
  return {0.5 * std::erfc(-0.70710678118654752440 * x), std::exp(-0.5 * x * x) * 0.39894228040143267794};
}

}  // namespace safe_kernels::cpu
