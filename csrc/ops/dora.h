#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline std::tuple<Tensor, Tensor> dora(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                                       double scaling, double dropout_p, const std::optional<Tensor>& rng_state) {
  return call_op<dora>("safe_kernels::dora", x, weight, bias, lora_A, lora_B, magnitude, scaling, dropout_p, rng_state);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> dora_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                                const Tensor& weight, const Tensor& lora_A,
                                                                const Tensor& lora_B, const Tensor& magnitude,
                                                                const Tensor& norm, double scaling, double dropout_p,
                                                                const std::optional<Tensor>& rng_state,
                                                                std::array<bool, 4> output_mask) {
  return call_op<dora_backward>("safe_kernels::dora_backward", grad, x, weight, lora_A, lora_B, magnitude, norm,
                                scaling, dropout_p, rng_state, output_mask);
}

// Throws an error that names the argument if a call is wrong on every backend.
void check_dora(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                const Tensor& lora_B, const Tensor& magnitude, double scaling, double dropout_p,
                const std::optional<Tensor>& rng_state);

void check_dora_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& magnitude, const Tensor& norm, double scaling,
                         double dropout_p, const std::optional<Tensor>& rng_state,
                         const std::array<bool, 4>& output_mask);

}  // namespace safe_kernels
