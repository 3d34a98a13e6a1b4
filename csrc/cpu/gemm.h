// A small matrix product for adapter shapes: one of m, n, k is the rank, or a block of rows. BLAS libraries are tuned
// for large squares and cost more to call than such a product takes; and they cannot start from another tensor's
// values.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace safe_kernels::cpu {

template <typename T>
struct Simd {
  static constexpr int kLanes = 32 / sizeof(T);
  typedef T Vector __attribute__((vector_size(32)));
};

// C [m, n] = init + L P, all row-major but L, whose elements lie at L[i * row_stride + k * k_stride] so that it may be
// transposed. `init` may be null (zeros), C itself (accumulate) or any other matrix.
template <typename T>
struct Gemm {
  int64_t m, n, k;
  const T* L;
  int64_t row_stride, k_stride;
  const T* P;
  int64_t p_stride;
  const T* init;
  int64_t init_stride;
  T* C;
  int64_t c_stride;
};

// Products are summed over so many k at a time, and those sums added: the rounding error of one long sum grows with
// its length, and the inner dimension of an adapter may be 14,336.
constexpr int64_t kSumLength = 128;

// MR x (NV vectors) of C: their sums stay in registers while a stretch of k is walked once.
template <typename T, int MR, int NV>
SAFE_KERNELS_INLINE void gemm_tile(const Gemm<T>& g, int64_t i, int64_t j) {
  using Vector = typename Simd<T>::Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  Vector total[MR][NV] = {};
  if (g.init != nullptr)
    for (int r = 0; r < MR; ++r) std::memcpy(total[r], g.init + (i + r) * g.init_stride + j, sizeof(total[r]));
  const T* left = g.L + i * g.row_stride;
  const T* panel = g.P + j;
  for (int64_t first = 0; first < g.k; first += kSumLength) {
    const int64_t count = g.k - first < kSumLength ? g.k - first : kSumLength;
    Vector sum[MR][NV] = {};
    for (int64_t k = 0; k < count; ++k, left += g.k_stride, panel += g.p_stride) {
      Vector p[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) std::memcpy(&p[v], panel + v * kLanes, sizeof(Vector));
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const T l = left[r * g.row_stride];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] += l * p[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) total[r][v] += sum[r][v];
  }
  for (int r = 0; r < MR; ++r) std::memcpy(g.C + (i + r) * g.c_stride + j, total[r], sizeof(total[r]));
}

// All rows of NV vectors of columns.
template <typename T, int MR, int NV>
SAFE_KERNELS_INLINE void gemm_columns(const Gemm<T>& g, int64_t j) {
  int64_t i = 0;
  for (; i + MR <= g.m; i += MR) gemm_tile<T, MR, NV>(g, i, j);
  for (; i < g.m; ++i) gemm_tile<T, 1, NV>(g, i, j);
}

template <typename T>
SAFE_KERNELS_INLINE void gemm_scalar(const Gemm<T>& g, int64_t j) {
  for (int64_t i = 0; i < g.m; ++i) {
    T sum = g.init != nullptr ? g.init[i * g.init_stride + j] : T(0);
    for (int64_t k = 0; k < g.k; ++k) sum += g.L[i * g.row_stride + k * g.k_stride] * g.P[k * g.p_stride + j];
    g.C[i * g.c_stride + j] = sum;
  }
}

// Tile heights are such that the sums, the panel and one broadcast fill the 16 registers of AVX2.
template <typename T>
SAFE_KERNELS_INLINE void gemm(const Gemm<T>& g) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t j = 0;
  for (; j + 3 * kLanes <= g.n; j += 3 * kLanes) gemm_columns<T, 4, 3>(g, j);
  if (j + 2 * kLanes <= g.n) {
    gemm_columns<T, 6, 2>(g, j);
    j += 2 * kLanes;
  } else if (j + kLanes <= g.n) {
    gemm_columns<T, 8, 1>(g, j);
    j += kLanes;
  }
  for (; j < g.n; ++j) gemm_scalar(g, j);
}

}  // namespace safe_kernels::cpu
