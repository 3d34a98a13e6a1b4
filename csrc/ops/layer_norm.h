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
inline void check_layer_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                             double eps) {
  check_has_features(x, "x");
  if (given(weight)) check_per_feature(*weight, "weight", x, "x");
  if (given(bias)) check_per_feature(*bias, "bias", x, "x");
  check_eps(eps);
}

inline void check_layer_norm_backward(const Tensor& grad, const Tensor& retained, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                      const Tensor& rstd, bool from_output, const std::array<bool, 3>& output_mask) {
  check_has_features(retained, "retained");
  check_same_shape(grad, "grad", retained, "retained");
  if (given(weight)) check_per_feature(*weight, "weight", retained, "retained");
  if (given(bias)) check_per_feature(*bias, "bias", retained, "retained");
  check_per_row(rstd, "rstd", retained, "retained");
  TORCH_CHECK_VALUE(from_output || given(mean),
                    "mean is needed when `retained` is the input (from_output=False), got None");
  if (given(mean)) check_per_row(*mean, "mean", retained, "retained");
  TORCH_CHECK_VALUE(!output_mask[1] || given(weight), "the gradient of weight is wanted, but weight is None");
  TORCH_CHECK_VALUE(!output_mask[2] || given(bias), "the gradient of bias is wanted, but bias is None");
}

}  // namespace safe_kernels
