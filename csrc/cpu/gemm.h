// A small matrix product for adapter shapes: one of m, n, k is the rank, or a block of rows. BLAS libraries are tuned
// for large matrices: their call takes longer than such a product. They also cannot start from another tensor's values.

#pragma once

#include <cstdint>

namespace safe_kernels::cpu {

// C [m, n] = init + L P, row-major except L, whose elements are at L[i * row_stride + k * k_stride], so that it may be
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

// Rows [begin, end) of C.
void gemm_rows(const Gemm<float>& g, int64_t begin, int64_t end);
void gemm_rows(const Gemm<double>& g, int64_t begin, int64_t end);

template <typename T>
inline void gemm(const Gemm<T>& g) {
  gemm_rows(g, 0, g.m);
}

}  // namespace safe_kernels::cpu
