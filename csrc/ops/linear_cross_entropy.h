#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"
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

inline void check_head(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == x.sym_size(-1) && weight.sym_size(0) >= 1,
                    "weight must have shape [classes, ", x.sym_size(-1), "], the last dimension of x ", x.sym_sizes(),
                    ", and at least one class, got ", weight.sym_sizes());
  if (given(bias)) check_per_output(*bias, "bias", weight, "weight");
  for (const auto& [tensor, name] : {std::pair(weight, "weight"), std::pair(given(bias) ? *bias : weight, "bias")}) {
    check_device(tensor, name, x, "x");
    TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x, ", x.scalar_type(),
                     ", got ", tensor.scalar_type());
  }
}

// Throws an error that names the argument if a call is wrong on every backend.
inline void check_linear_cross_entropy(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& target, int64_t /*ignore_index*/, double scaling, double softcap) {
  check_has_features(x, "x");
  check_head(x, weight, bias);
  check_dense(target, "target");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64, got ", target.scalar_type());
  TORCH_CHECK_VALUE(target.sym_sizes() == x.sym_sizes().slice(0, x.dim() - 1), "target must have shape ",
                    x.sym_sizes().slice(0, x.dim() - 1), ", one class per row of x, got ", target.sym_sizes());
  check_device(target, "target", x, "x");
  TORCH_CHECK_VALUE(std::isfinite(scaling), "scaling must be finite, got ", scaling);
  TORCH_CHECK_VALUE(softcap >= 0.0 && std::isfinite(softcap), "softcap must be at least 0 and finite, got ", softcap);
}

}  // namespace safe_kernels
