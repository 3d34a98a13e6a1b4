#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                           bool retain_output) {
  return call_op<rms_norm>("safe_kernels::rms_norm", x, weight, eps, weight_offset, retain_output);
}

inline std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& retained, const Tensor& weight,
                                                    const Tensor& rstd, double weight_offset, bool from_output,
                                                    std::array<bool, 2> output_mask) {
  return call_op<rms_norm_backward>("safe_kernels::rms_norm_backward", grad, retained, weight, rstd, weight_offset,
                                    from_output, output_mask);
}

// Throws an error that names the argument if a call is wrong on every backend.
inline void check_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_has_features(x, "x");
  check_per_feature(weight, "weight", x, "x");
  check_eps(eps);
}

inline void check_rms_norm_backward(const Tensor& grad, const Tensor& retained, const Tensor& weight,
                                    const Tensor& rstd, double /*weight_offset*/, bool /*from_output*/,
                                    const std::array<bool, 2>& /*output_mask*/) {
  check_has_features(retained, "retained");
  check_same_shape(grad, "grad", retained, "retained");
  check_per_feature(weight, "weight", retained, "retained");
  check_per_row(rstd, "rstd", retained, "retained");
}

}  // namespace safe_kernels
