// The sums that score an adapter, from one block of rows: see cka_sums in safe_kernels/reference/importance.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace safe_kernels::cpu {

struct Sums {
  double a = 0, b = 0, c = 0, rows = 0;
};

template <typename T>
struct CkaArgs {
  Rows base;
  const T* h;  // [N, h_stride], scaling * dropout(x) A'
  int64_t h_stride;
  const T* lora_B;  // [d_out, h_stride], zero from column r on
  int64_t r;
  const int64_t* starts;  // [n blocks]
  int64_t block_rows;
  const bool* counts;  // [N] or null
  Sums* sums;          // [n blocks]
};

// Columns of features per step: a block of 128 rows stays in the L2 cache.
constexpr int64_t kFeatures = 128;

// target [columns, rows] = the transpose of values, in double, minus each column's mean. Double, because K and E are
// nearly parallel if an adapter is aligned with its layer, and then a c - b^2 is a small difference.
template <typename T>
SAFE_KERNELS_INLINE void centre_columns(const T* values, int64_t stride, int64_t rows, int64_t columns,
                                        double* target) {
  for (int64_t j = 0; j < columns; ++j) {
    double mean = 0;
    for (int64_t i = 0; i < rows; ++i) mean += static_cast<double>(values[i * stride + j]);
    mean /= static_cast<double>(rows);
    for (int64_t i = 0; i < rows; ++i) target[j * rows + i] = static_cast<double>(values[i * stride + j]) - mean;
  }
}

// Inner products of the symmetric K [n, n] and of E = V H' + H V', from upper triangles only.
SAFE_KERNELS_INLINE void add_products(const double* K, const double* E, int64_t n, Sums& sums) {
  for (int64_t i = 0; i < n; ++i) {
    double a = 0, b = 0, c = 0;
    for (int64_t j = i + 1; j < n; ++j) {
      const double k = K[i * n + j], e = E[i * n + j];
      a += k * k;
      b += k * e;
      c += e * e;
    }
    const double k = K[i * n + i], e = E[i * n + i];
    sums.a += 2 * a + k * k;
    sums.b += 2 * b + k * e;
    sums.c += 2 * c + e * e;
  }
}

// C [n, n] (+)= L' P for matrices [k, n], upper triangle only: rows below a panel are skipped.
SAFE_KERNELS_INLINE void gemm_upper(int64_t n, int64_t k, const double* L, const double* P, bool accumulate,
                                    double* C) {
  constexpr int64_t kPanel = 24;
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t width = n - j < kPanel ? n - j : kPanel;
    const double* init = accumulate ? C + j : nullptr;
    gemm<double>({j + width, width, k, L, 1, n, P + j, n, init, n, C + j, n});
  }
}

template <typename T>
SAFE_KERNELS_INLINE std::vector<int64_t> chosen_rows(const CkaArgs<T>& args, int64_t block) {
  std::vector<int64_t> rows;
  const int64_t begin = args.starts[block];
  const int64_t left = args.base.count - begin;
  const int64_t end = begin + (left < args.block_rows ? left : args.block_rows);
  for (int64_t row = begin; row < end; ++row)
    if (args.counts == nullptr || args.counts[row]) rows.push_back(row);
  return rows;
}

// With Xc [n, d_out] and hc [n, r] centred: E = Xc (hc B')' + (hc B') Xc' + hc B'B hc' = V hc' + hc V', where
// V = Xc B + hc (B'B) / 2. The adapter's output [n, d_out] is never stored.
template <typename T>
SAFE_KERNELS_INLINE void cka_block(const CkaArgs<T>& args, int64_t block) {
  const std::vector<int64_t> rows = chosen_rows(args, block);
  const int64_t n = static_cast<int64_t>(rows.size()), r = args.r, d = args.base.columns;
  Sums& sums = args.sums[block];
  sums.rows = static_cast<double>(n);
  if (n < 2) return;
  std::vector<double> K(n * n), E(n * n), X(kFeatures * n), B(kFeatures * r), G(r * r);
  std::vector<double> VH(2 * r * n), HV(2 * r * n);  // [V; H]' and [H; V]' as rows of length n
  std::vector<T> values(n * kFeatures), h(n * r);
  double* V = VH.data();
  double* H = HV.data();
  for (int64_t i = 0; i < n && r > 0; ++i)
    std::memcpy(h.data() + i * r, args.h + rows[i] * args.h_stride, r * sizeof(T));
  centre_columns(h.data(), r, n, r, H);
  for (int64_t j = 0; j < d; j += kFeatures) {
    const int64_t width = d - j < kFeatures ? d - j : kFeatures;
    for (int64_t i = 0; i < n; ++i) read_row(args.base, rows[i], j, width, values.data() + i * width);
    centre_columns(values.data(), width, n, width, X.data());
    for (int64_t f = 0; f < width; ++f)
      for (int64_t c = 0; c < r; ++c) B[f * r + c] = static_cast<double>(args.lora_B[(j + f) * args.h_stride + c]);
    gemm_upper(n, width, X.data(), X.data(), j > 0, K.data());
    const bool first = j == 0;
    gemm<double>({r, n, width, B.data(), 1, r, X.data(), n, first ? nullptr : V, n, V, n});
    gemm<double>({r, r, width, B.data(), 1, r, B.data(), r, first ? nullptr : G.data(), r, G.data(), r});
  }
  if (r > 0) {  // otherwise E stays zero, and the vectors are empty
    for (double& g : G) g *= 0.5;
    gemm<double>({r, n, r, G.data(), r, 1, H, n, V, n, V, n});
    std::memcpy(VH.data() + r * n, H, r * n * sizeof(double));
    std::memcpy(HV.data() + r * n, V, r * n * sizeof(double));
    gemm_upper(n, 2 * r, VH.data(), HV.data(), false, E.data());
  }
  add_products(K.data(), E.data(), n, sums);
}

template <typename T>
SAFE_KERNELS_INLINE void cka_blocks(const CkaArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) cka_block(args, block);
}

// The sums of all blocks, float64 [4]. `h` and `lora_B` are as in CkaArgs; see lora.cpp.
at::Tensor score(const Rows& base, const at::Tensor& h, const at::Tensor& lora_B, int64_t r,
                 const at::Tensor& block_starts, int64_t block_rows, const std::optional<at::Tensor>& row_weight);

}  // namespace safe_kernels::cpu
