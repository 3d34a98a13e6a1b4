// Vectors of the compiler's own, and sums over a row with them. Several vectors of partial sums hide the latency of an
// addition, and the error of a sum grows with the length of a partial one. The order of additions follows from the
// length alone.

#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace safe_kernels::cpu {

// How many elements a step takes: a vector, or one of those that are left over.
template <typename T>
struct Wide {
  using Real = T;
  static constexpr int64_t kLanes = 32 / sizeof(T);
  typedef T Vector __attribute__((vector_size(32)));
  typedef T InMemory __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
};

template <typename T>
struct Narrow {
  using Real = T;
  static constexpr int64_t kLanes = 1;
  typedef T Vector;
  typedef T InMemory;
};

template <typename Step>
SAFE_KERNELS_INLINE const typename Step::InMemory& load(const typename Step::Real* values) {
  return *reinterpret_cast<const typename Step::InMemory*>(values);
}

template <typename Step>
SAFE_KERNELS_INLINE void store(typename Step::Real* values, const typename Step::Vector& value) {
  *reinterpret_cast<typename Step::InMemory*>(values) = value;
}

// The sum of the lanes of all partial sums.
template <typename T, int count>
SAFE_KERNELS_INLINE T total(typename Wide<T>::Vector (&partial)[count]) {
  for (int stride = count / 2; stride > 0; stride /= 2)
    for (int v = 0; v < stride; ++v) partial[v] += partial[v + stride];
  T result = T(0);
  for (int lane = 0; lane < Wide<T>::kLanes; ++lane) result += partial[0][lane];
  return result;
}

// The sum of values - level.
template <typename T>
SAFE_KERNELS_INLINE T sum(const T* values, T level, int64_t count) {
  constexpr int64_t kLanes = Wide<T>::kLanes;
  typename Wide<T>::Vector partial[4] = {};
  T rest = T(0);
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) partial[v] += load<Wide<T>>(values + j + v * kLanes) - level;
  for (; j + kLanes <= count; j += kLanes) partial[0] += load<Wide<T>>(values + j) - level;
  for (; j < count; ++j) rest += values[j] - level;
  return total<T>(partial) + rest;
}

// The sum of (values - level)^2.
template <typename T>
SAFE_KERNELS_INLINE T sum_of_squares(const T* values, T level, int64_t count) {
  constexpr int64_t kLanes = Wide<T>::kLanes;
  typename Wide<T>::Vector partial[4] = {};
  T rest = T(0);
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const typename Wide<T>::Vector distance = load<Wide<T>>(values + j + v * kLanes) - level;
      partial[v] += distance * distance;
    }
  for (; j + kLanes <= count; j += kLanes) {
    const typename Wide<T>::Vector distance = load<Wide<T>>(values + j) - level;
    partial[0] += distance * distance;
  }
  for (; j < count; ++j) rest += (values[j] - level) * (values[j] - level);
  return total<T>(partial) + rest;
}

}  // namespace safe_kernels::cpu
