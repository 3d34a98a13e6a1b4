#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "ops/lora.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                              double dropout_p, const std::optional<Tensor>& rng_state,
                                              const std::optional<Tensor>& block_starts, int64_t block_rows,
                                              const std::optional<Tensor>& row_weight) {
  return call_op<lora_linear>("safe_kernels::lora_linear", x, weight, bias, lora_A, lora_B, scaling, dropout_p,
                              rng_state, block_starts, block_rows, row_weight);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
    std::array<bool, 5> output_mask) {
  return call_op<lora_linear_backward>("safe_kernels::lora_linear_backward", grad, x, weight, lora_A, lora_B, scaling,
                                       dropout_p, rng_state, output_mask);
}

// A linear layer does not promote dtypes.
inline void check_dtype(const Tensor& tensor, const char* name, const Tensor& weight) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == weight.scalar_type(), name, " and weight must have one dtype, got ",
                   tensor.scalar_type(), " and ", weight.scalar_type(), "; cast ", name);
}

// These throw an error that names the argument if a call is wrong on every backend. `dora` shares the first.
inline void check_weight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  check_adapter(lora_A, lora_B);
  check_device(lora_B, "lora_B", lora_A, "lora_A");
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have shape [d_out, d_in], got ", weight.sym_sizes());
  TORCH_CHECK_VALUE(weight.sym_size(1) == lora_A.sym_size(1) && weight.sym_size(0) == lora_B.sym_size(0),
                    "weight must have shape [", lora_B.sym_size(0), ", ", lora_A.sym_size(1),
                    "], d_out of lora_B by d_in of lora_A, got ", weight.sym_sizes());
  check_device(weight, "weight", lora_A, "lora_A");
}

inline void check_lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& lora_A, const Tensor& lora_B, double /*scaling*/, double dropout_p,
                              const std::optional<Tensor>& rng_state, const std::optional<Tensor>& block_starts,
                              int64_t block_rows, const std::optional<Tensor>& row_weight) {
  check_weight(weight, lora_A, lora_B);
  check_features(x, "x", weight, "weight", 1);
  check_dtype(x, "x", weight);
  if (given(bias)) {
    check_per_output(*bias, "bias", weight, "weight");
    check_dtype(*bias, "bias", weight);
  }
  check_dropout(dropout_p, rng_state, x, "x");
  if (given(block_starts)) check_blocks(x, *block_starts, block_rows, row_weight);
}

inline void check_lora_linear_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight,
                                       const Tensor& lora_A, const Tensor& lora_B, double /*scaling*/, double dropout_p,
                                       const std::optional<Tensor>& rng_state, const std::array<bool, 5>& output_mask) {
  check_weight(weight, lora_A, lora_B);
  check_features(grad, "grad", weight, "weight", 0);
  check_dropout(dropout_p, rng_state, grad, "grad");
  if (given(x)) {
    check_features(*x, "x", weight, "weight", 1);
    check_leading(grad, "grad", *x);
  } else {
    TORCH_CHECK_VALUE(!output_mask[1] && !output_mask[3] && !output_mask[4],
                      "x is needed for the gradients of weight, lora_A and lora_B, got None");
  }
}

}  // namespace safe_kernels
