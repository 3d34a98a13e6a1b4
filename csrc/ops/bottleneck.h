#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline std::tuple<Tensor, Tensor, Tensor> bottleneck(const Tensor& x, const Tensor& residual, const Tensor& W_down,
                                                     const Tensor& b_down, const Tensor& W_up, const Tensor& b_up,
                                                     std::string_view activation, double scaling, double dropout_p,
                                                     const std::optional<Tensor>& rng_state,
                                                     const std::optional<Tensor>& block_starts, int64_t block_rows,
                                                     const std::optional<Tensor>& row_weight) {
  return call_op<bottleneck>("safe_kernels::bottleneck", x, residual, W_down, b_down, W_up, b_up, activation, scaling,
                             dropout_p, rng_state, block_starts, block_rows, row_weight);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& z, const Tensor& W_down,
    const Tensor& b_down, const Tensor& W_up, std::string_view activation, double scaling, double dropout_p,
    const std::optional<Tensor>& rng_state, std::array<bool, 5> output_mask) {
  return call_op<bottleneck_backward>("safe_kernels::bottleneck_backward", grad, x, z, W_down, b_down, W_up, activation,
                                      scaling, dropout_p, rng_state, output_mask);
}

// These throw an error that names the argument if a call is wrong on every backend.
void check_bottleneck(const Tensor& x, const Tensor& residual, const Tensor& W_down, const Tensor& b_down,
                      const Tensor& W_up, const Tensor& b_up, std::string_view activation, double scaling,
                      double dropout_p, const std::optional<Tensor>& rng_state,
                      const std::optional<Tensor>& block_starts, int64_t block_rows,
                      const std::optional<Tensor>& row_weight);

void check_bottleneck_backward(const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& z,
                               const Tensor& W_down, const Tensor& b_down, const Tensor& W_up,
                               std::string_view activation, double scaling, double dropout_p,
                               const std::optional<Tensor>& rng_state, const std::array<bool, 5>& output_mask);

}  // namespace safe_kernels
