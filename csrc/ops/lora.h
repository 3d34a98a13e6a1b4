#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline std::tuple<Tensor, Tensor> lora(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B,
                                       double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                                       const std::optional<Tensor>& block_starts, int64_t block_rows,
                                       const std::optional<Tensor>& row_weight) {
  return call_op<lora>("safe_kernels::lora", x, base, lora_A, lora_B, scaling, dropout_p, rng_state, block_starts,
                       block_rows, row_weight);
}

inline std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                        const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                        double dropout_p, const std::optional<Tensor>& rng_state,
                                                        std::array<bool, 3> output_mask) {
  return call_op<lora_backward>("safe_kernels::lora_backward", grad, x, lora_A, lora_B, scaling, dropout_p, rng_state,
                                output_mask);
}

// These throw an error that names the argument if a call is wrong on every backend. Other ops with an adapter share the
// first four: its two matrices; a last dimension that must match a weight; leading dimensions; the scored rows.
inline void check_adapter(const Tensor& lora_A, const Tensor& lora_B) {
  check_floating(lora_A, "lora_A");
  check_floating(lora_B, "lora_B");
  TORCH_CHECK_VALUE(lora_A.dim() == 2, "lora_A must have shape [r, d_in], got ", lora_A.sym_sizes());
  TORCH_CHECK_VALUE(lora_B.dim() == 2, "lora_B must have shape [d_out, r], got ", lora_B.sym_sizes());
  TORCH_CHECK_VALUE(lora_A.sym_size(0) == lora_B.sym_size(1), "lora_A ", lora_A.sym_sizes(), " and lora_B ",
                    lora_B.sym_sizes(), " differ in r: got ", lora_A.sym_size(0), " and ", lora_B.sym_size(1));
  TORCH_CHECK_TYPE(lora_A.scalar_type() == lora_B.scalar_type(), "lora_A and lora_B must have one dtype, got ",
                   lora_A.scalar_type(), " and ", lora_B.scalar_type());
}

inline void check_features(const Tensor& tensor, const char* name, const Tensor& weight, const char* weight_name,
                           int64_t weight_dim) {
  check_has_features(tensor, name);
  TORCH_CHECK_VALUE(tensor.sym_size(-1) == weight.sym_size(weight_dim), name, " has last dimension ",
                    tensor.sym_size(-1), " but ", weight_name, " ", weight.sym_sizes(), " expects ",
                    weight.sym_size(weight_dim));
  check_device(tensor, name, weight, weight_name);
}

inline void check_leading(const Tensor& tensor, const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(tensor.sym_sizes().slice(0, tensor.dim() - 1) == x.sym_sizes().slice(0, x.dim() - 1), name, " ",
                    tensor.sym_sizes(), " and x ", x.sym_sizes(), " must agree in all dimensions but the last");
}

inline void check_blocks(const Tensor& x, const Tensor& block_starts, int64_t block_rows,
                         const std::optional<Tensor>& row_weight) {
  check_dense(block_starts, "block_starts");
  TORCH_CHECK_TYPE(block_starts.scalar_type() == at::kLong, "block_starts must be int64, got ",
                   block_starts.scalar_type());
  TORCH_CHECK_VALUE(block_starts.dim() == 1, "block_starts must have one dimension, got ", block_starts.sym_sizes());
  TORCH_CHECK_VALUE(block_rows >= 1, "block_rows must be at least 1, got ", block_rows);
  check_device(block_starts, "block_starts", x, "x");
  if (!given(row_weight)) return;
  check_dense(*row_weight, "row_weight");
  const auto rows = c10::multiply_integers(x.sym_sizes().slice(0, x.dim() - 1));
  TORCH_CHECK_VALUE(row_weight->dim() == 1 && row_weight->sym_size(0) == rows, "row_weight must have shape [", rows,
                    "], one number per row of x, got ", row_weight->sym_sizes());
  check_device(*row_weight, "row_weight", x, "x");
}

inline void check_lora(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B,
                       double /*scaling*/, double dropout_p, const std::optional<Tensor>& rng_state,
                       const std::optional<Tensor>& block_starts, int64_t block_rows,
                       const std::optional<Tensor>& row_weight) {
  check_adapter(lora_A, lora_B);
  check_device(lora_B, "lora_B", lora_A, "lora_A");
  check_features(x, "x", lora_A, "lora_A", 1);
  check_features(base, "base", lora_B, "lora_B", 0);
  check_leading(base, "base", x);
  check_dropout(dropout_p, rng_state, x, "x");
  if (given(block_starts)) {
    check_blocks(x, *block_starts, block_rows, row_weight);
  }
}

inline void check_lora_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& lora_A,
                                const Tensor& lora_B, double /*scaling*/, double dropout_p,
                                const std::optional<Tensor>& rng_state, const std::array<bool, 3>& output_mask) {
  check_adapter(lora_A, lora_B);
  check_features(grad, "grad", lora_B, "lora_B", 0);
  check_dropout(dropout_p, rng_state, grad, "grad");
  if (given(x)) {
    check_features(*x, "x", lora_A, "lora_A", 1);
    check_leading(grad, "grad", *x);
  } else {
    TORCH_CHECK_VALUE(!output_mask[1] && !output_mask[2],
                      "x is needed for the gradients of lora_A and lora_B, got None");
  }
}

}  // namespace safe_kernels
