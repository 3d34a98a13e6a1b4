#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "ops/lora_linear.h"

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
inline void check_dora(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                       const Tensor& lora_B, const Tensor& magnitude, double /*scaling*/, double dropout_p,
                       const std::optional<Tensor>& rng_state) {
  check_weight(weight, lora_A, lora_B);
  check_features(x, "x", weight, "weight", 1);
  check_device(x, "x", weight, "weight");
  if (given(bias)) check_per_output(*bias, "bias", weight, "weight");
  check_per_output(magnitude, "magnitude", weight, "weight");
  check_dropout(dropout_p, rng_state, x, "x");
}

inline void check_dora_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight,
                                const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude, const Tensor& norm,
                                double /*scaling*/, double dropout_p, const std::optional<Tensor>& rng_state,
                                const std::array<bool, 4>& output_mask) {
  check_weight(weight, lora_A, lora_B);
  check_features(grad, "grad", weight, "weight", 0);
  check_per_output(magnitude, "magnitude", weight, "weight");
  check_per_output(norm, "norm", weight, "weight");
  check_dropout(dropout_p, rng_state, grad, "grad");
  if (given(x)) {
    check_features(*x, "x", weight, "weight", 1);
    check_leading(grad, "grad", *x);
  } else {
    TORCH_CHECK_VALUE(!output_mask[1] && !output_mask[2] && !output_mask[3],
                      "x is needed for the gradients of lora_A, lora_B and magnitude, got None");
  }
}

}  // namespace safe_kernels
