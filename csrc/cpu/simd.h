// The compiler's vector types, and sums over a row with them. Several vectors of partial sums hide the latency of an
// addition and reduce the rounding error. The order of additions depends only on the length.
//
// ATen's at::vec is not used here: compiler flags fix its instructions for a whole translation unit, and inline
// functions of other headers that were compiled there for AVX2 could be linked into code for the baseline. With AVX2,
// 4,096 elements of SwiGLU take 2.2 us with elementary.h, 2.6 with at::vec's exp_u20 and 4.4 with its exp; GeGLU
// takes 4.2 and 7.2 us.

#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace safe_kernels::cpu {

// The width of a step: a vector, or one of the remaining elements.
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

template <bool kSquared, typename Step>
SAFE_KERNELS_INLINE void add_distance(const typename Step::Real* values, typename Step::Real level,
                                      typename Step::Vector& sum) {
  const typename Step::Vector distance = load<Step>(values) - level;
  if constexpr (kSquared) {
    sum += distance * distance;
  } else {
    sum += distance;
  }
}

// The sum of values - level, or of its square.
template <bool kSquared, typename T>
SAFE_KERNELS_INLINE T sum_of_distances(const T* values, T level, int64_t count) {
  constexpr int64_t kLanes = Wide<T>::kLanes;
  typename Wide<T>::Vector partial[4] = {};
  T rest = T(0);
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) add_distance<kSquared, Wide<T>>(values + j + v * kLanes, level, partial[v]);
  for (; j + kLanes <= count; j += kLanes) add_distance<kSquared, Wide<T>>(values + j, level, partial[0]);
  for (; j < count; ++j) add_distance<kSquared, Narrow<T>>(values + j, level, rest);
  return total<T>(partial) + rest;
}

}  // namespace safe_kernels::cpu
