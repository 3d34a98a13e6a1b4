#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes stand in safe_kernels/reference/.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                    bool retain_output);

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& retained, const Tensor& weight,
                                             const Tensor& rstd, double weight_offset, bool from_output,
                                             std::array<bool, 2> output_mask);

// Throws, naming the argument, when a call cannot be right on any backend.
void check_rms_norm(const Tensor& x, const Tensor& weight, double eps);

void check_rms_norm_backward(const Tensor& grad, const Tensor& retained, const Tensor& weight, const Tensor& rstd,
                             double weight_offset, bool from_output, const std::array<bool, 2>& output_mask);

}  // namespace safe_kernels
