#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias, double eps,
                                                     bool retain_output) {
  return call_op<layer_norm>("safe_kernels::layer_norm", x, weight, bias, eps, retain_output);
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& retained,
                                                              const std::optional<Tensor>& weight,
                                                              const std::optional<Tensor>& bias,
                                                              const std::optional<Tensor>& mean, const Tensor& rstd,
                                                              bool from_output, std::array<bool, 3> output_mask) {
  return call_op<layer_norm_backward>("safe_kernels::layer_norm_backward", grad, retained, weight, bias, mean, rstd,
                                      from_output, output_mask);
}

// Throws an error that names the argument if a call is wrong on every backend.
void check_layer_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                      double eps);

void check_layer_norm_backward(const Tensor& grad, const Tensor& retained, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& mean, const Tensor& rstd,
                               bool from_output, const std::array<bool, 3>& output_mask);

}  // namespace safe_kernels
