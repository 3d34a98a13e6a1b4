#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/. The second op computes the
// gradient together with the losses: autograd calls it in forward.
inline Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const Tensor& target, int64_t ignore_index, double scaling, double softcap) {
  return call_op<linear_cross_entropy>("safe_kernels::linear_cross_entropy", x, weight, bias, target, ignore_index,
                                       scaling, softcap);
}

inline std::tuple<Tensor, Tensor> linear_cross_entropy_backward(const Tensor& x, const Tensor& weight,
                                                                const std::optional<Tensor>& bias, const Tensor& target,
                                                                int64_t ignore_index, double scaling, double softcap) {
  return call_op<linear_cross_entropy_backward>("safe_kernels::linear_cross_entropy_backward", x, weight, bias, target,
                                                ignore_index, scaling, softcap);
}

// Throws an error that names the argument if a call is wrong on every backend.
void check_linear_cross_entropy(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const Tensor& target, int64_t ignore_index, double scaling, double softcap);

}  // namespace safe_kernels
