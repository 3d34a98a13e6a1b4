// RMSNorm and LayerNorm on a CPU. The formulas are in safe_kernels/reference/rms_norm.py and layer_norm.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace safe_kernels::cpu {

using at::Tensor;

// The affine part of a norm: x_hat (weight + weight_offset) + bias.
struct Affine {
  std::optional<Tensor> weight;
  double weight_offset;
  std::optional<Tensor> bias;
};

// out, mean and rstd. Only if `centred` (LayerNorm), the mean is subtracted, and the bias is read.
std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const Affine& affine, double eps, bool centred);

// The gradients of x, weight and bias; an unwanted one has shape [0]. `mean` is not read if `retained` is the output.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& retained, const Affine& affine,
                                                 const std::optional<Tensor>& mean, const Tensor& rstd, bool centred,
                                                 bool from_output, const std::array<bool, 3>& wanted);

}  // namespace safe_kernels::cpu
