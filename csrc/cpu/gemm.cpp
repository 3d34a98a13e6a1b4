#include "cpu/gemm.h"

#include "cpu/simd.h"

namespace safe_kernels::cpu {

namespace {

// A sum over k has parts of this length, which are then added: the rounding error of one long sum grows with its
// length, and the inner dimension of an adapter may be 14,336.
constexpr int64_t kSumLength = 128;

// P is read again for every few rows of C and must fit into the L2 cache with them; a larger P is split.
constexpr int64_t kPanelBytes = 128 * 1024;

// MR x (NV vectors) of C: the sums stay in registers while one part of k is read once.
template <typename T, int MR, int NV>
SAFE_KERNELS_INLINE void tile(const Gemm<T>& g, int64_t i, int64_t j) {
  using Vector = typename Wide<T>::Vector;
  using Unaligned = typename Wide<T>::InMemory;
  const T* init = g.init == nullptr ? nullptr : g.init + i * g.init_stride + j;
  int64_t init_stride = g.init_stride;
  T* const C = g.C + i * g.c_stride + j;
  const T* left = g.L + i * g.row_stride;
  const T* panel = g.P + j;
  for (int64_t first = 0; first == 0 || first < g.k; first += kSumLength) {
    const int64_t count = g.k - first < kSumLength ? g.k - first : kSumLength;
    Vector sum[MR][NV] = {};
    for (int64_t k = 0; k < count; ++k, left += g.k_stride, panel += g.p_stride) {
      const Unaligned* p = reinterpret_cast<const Unaligned*>(panel);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const T l = left[r * g.row_stride];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sum[r][v] += l * p[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      Unaligned* row = reinterpret_cast<Unaligned*>(C + r * g.c_stride);
      if (init == nullptr) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) row[v] = sum[r][v];
      } else {
        const Unaligned* start = reinterpret_cast<const Unaligned*>(init + r * init_stride);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) row[v] = start[v] + sum[r][v];
      }
    }
    init = C;
    init_stride = g.c_stride;
  }
}

template <typename T>
SAFE_KERNELS_INLINE void element(const Gemm<T>& g, int64_t i, int64_t j) {
  T sum = T(0);
  for (int64_t k = 0; k < g.k; ++k) sum += g.L[i * g.row_stride + k * g.k_stride] * g.P[k * g.p_stride + j];
  g.C[i * g.c_stride + j] = g.init != nullptr ? g.init[i * g.init_stride + j] + sum : sum;
}

// MR rows, columns [first, last). 6 x 2 vectors of sums, two of P and one broadcast fill the registers of AVX2.
template <typename T, int MR>
SAFE_KERNELS_INLINE void band(const Gemm<T>& g, int64_t i, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Wide<T>::kLanes;
  int64_t j = first;
  for (; j + 2 * kLanes <= last; j += 2 * kLanes) tile<T, MR, 2>(g, i, j);
  for (; j + kLanes <= last; j += kLanes) tile<T, MR, 1>(g, i, j);
  for (; j < last; ++j)
    for (int r = 0; r < MR; ++r) element(g, i + r, j);
}

template <typename T>
SAFE_KERNELS_INLINE void bands(const Gemm<T>& g, int64_t begin, int64_t end, int64_t first, int64_t last) {
  int64_t i = begin;
  if (last - first < 2 * Wide<T>::kLanes)  // one vector per row: more rows hide a product's latency
    for (; i + 8 <= end; i += 8) band<T, 8>(g, i, first, last);
  for (; i + 6 <= end; i += 6) band<T, 6>(g, i, first, last);
  for (; i + 2 <= end; i += 2) band<T, 2>(g, i, first, last);
  if (i < end) band<T, 1>(g, i, first, last);
}

template <typename T>
SAFE_KERNELS_INLINE void gemm_body(const Gemm<T>& g, int64_t begin, int64_t end) {
  constexpr int64_t kStrip = 2 * Wide<T>::kLanes;
  if (g.k == 0) {  // L and P may be null: pointer arithmetic is not allowed
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < g.n; ++j) element(g, i, j);
    return;
  }
  if (g.k * g.n * static_cast<int64_t>(sizeof(T)) <= kPanelBytes) return bands(g, begin, end, 0, g.n);
  Gemm<T> piece = g;
  for (int64_t k = 0; k < g.k; k += kSumLength) {
    piece.k = g.k - k < kSumLength ? g.k - k : kSumLength;
    piece.L = g.L + k * g.k_stride;
    piece.P = g.P + k * g.p_stride;
    for (int64_t j = 0; j < g.n; j += kStrip) bands(piece, begin, end, j, j + kStrip < g.n ? j + kStrip : g.n);
    piece.init = g.C;
    piece.init_stride = g.c_stride;
  }
}

}  // namespace

SAFE_KERNELS_REAL_VARIANTS(gemm_rows, gemm_body, Gemm)

}  // namespace safe_kernels::cpu
