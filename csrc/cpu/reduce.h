// Sums over a row. Four vectors of partial sums hide the latency of an addition, and the error of a sum grows with the
// length of a partial one. The order of additions follows from the length alone.

#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace safe_kernels::cpu {

template <typename T>
struct Partial {
  static constexpr int64_t kLanes = 32 / sizeof(T), kStep = 4 * kLanes;
  typedef T Vector __attribute__((vector_size(32)));
  typedef T Unaligned __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
};

template <typename T>
SAFE_KERNELS_INLINE const typename Partial<T>::Unaligned& vector_at(const T* values) {
  return *reinterpret_cast<const typename Partial<T>::Unaligned*>(values);
}

template <typename T>
SAFE_KERNELS_INLINE T total(const typename Partial<T>::Vector (&partial)[4], T rest) {
  const typename Partial<T>::Vector sum = (partial[0] + partial[1]) + (partial[2] + partial[3]);
  T result = rest;
  for (int lane = 0; lane < Partial<T>::kLanes; ++lane) result += sum[lane];
  return result;
}

template <typename T>
SAFE_KERNELS_INLINE T sum(const T* values, int64_t count) {
  typename Partial<T>::Vector partial[4] = {};
  T rest = T(0);
  int64_t j = 0;
  for (; j + Partial<T>::kStep <= count; j += Partial<T>::kStep)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) partial[v] += vector_at(values + j + v * Partial<T>::kLanes);
  for (; j + Partial<T>::kLanes <= count; j += Partial<T>::kLanes) partial[0] += vector_at(values + j);
  for (; j < count; ++j) rest += values[j];
  return total(partial, rest);
}

template <typename T>
SAFE_KERNELS_INLINE T dot(const T* left, const T* right, int64_t count) {
  typename Partial<T>::Vector partial[4] = {};
  T rest = T(0);
  int64_t j = 0;
  for (; j + Partial<T>::kStep <= count; j += Partial<T>::kStep)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t k = j + v * Partial<T>::kLanes;
      partial[v] += vector_at(left + k) * vector_at(right + k);
    }
  for (; j + Partial<T>::kLanes <= count; j += Partial<T>::kLanes)
    partial[0] += vector_at(left + j) * vector_at(right + j);
  for (; j < count; ++j) rest += left[j] * right[j];
  return total(partial, rest);
}

}  // namespace safe_kernels::cpu
