#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "dispatch.h"

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

// These throw an error that names the argument if a call is wrong on every backend. `dora` shares the first.
void check_weight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B);

void check_lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                       const Tensor& lora_B, double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                       const std::optional<Tensor>& block_starts, int64_t block_rows,
                       const std::optional<Tensor>& row_weight);

void check_lora_linear_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight,
                                const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                const std::optional<Tensor>& rng_state, const std::array<bool, 5>& output_mask);

}  // namespace safe_kernels
