#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "ops/activation.h"
#include "ops/lora.h"

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

// A layer's weight [out, in] and its bias [out], of the dtype of `like`.
inline void check_layer(const Tensor& weight, const char* name, const char* shape, const Tensor& like,
                        const char* like_name) {
  check_floating(weight, name);
  TORCH_CHECK_VALUE(weight.dim() == 2, name, " must have shape ", shape, ", got ", weight.sym_sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == like.scalar_type(), name, " and ", like_name, " must have one dtype, got ",
                   weight.scalar_type(), " and ", like.scalar_type());
  check_device(weight, name, like, like_name);
}

inline void check_bias(const Tensor& bias, const char* name, const Tensor& weight, const char* weight_name) {
  check_per_output(bias, name, weight, weight_name);
  TORCH_CHECK_TYPE(bias.scalar_type() == weight.scalar_type(), name, " and ", weight_name, " must have one dtype, got ",
                   bias.scalar_type(), " and ", weight.scalar_type());
}

inline void check_weights(const Tensor& W_down, const Tensor& b_down, const Tensor& W_up) {
  check_dense(W_up, "W_up");
  check_layer(W_down, "W_down", "[r, d_in]", W_up, "W_up");
  check_layer(W_up, "W_up", "[d_out, r]", W_down, "W_down");
  TORCH_CHECK_VALUE(W_down.sym_size(0) == W_up.sym_size(1), "W_down ", W_down.sym_sizes(), " and W_up ",
                    W_up.sym_sizes(), " differ in r: got ", W_down.sym_size(0), " and ", W_up.sym_size(1));
  check_bias(b_down, "b_down", W_down, "W_down");
}

// These throw an error that names the argument if a call is wrong on every backend.
inline void check_bottleneck(const Tensor& x, const Tensor& residual, const Tensor& W_down, const Tensor& b_down,
                             const Tensor& W_up, const Tensor& b_up, std::string_view activation, double /*scaling*/,
                             double dropout_p, const std::optional<Tensor>& rng_state,
                             const std::optional<Tensor>& block_starts, int64_t block_rows,
                             const std::optional<Tensor>& row_weight) {
  check_kind(activation, "activation");
  check_weights(W_down, b_down, W_up);
  check_bias(b_up, "b_up", W_up, "W_up");
  check_features(x, "x", W_down, "W_down", 1);
  check_features(residual, "residual", W_up, "W_up", 0);
  check_leading(residual, "residual", x);
  check_dropout(dropout_p, rng_state, x, "x");
  if (given(block_starts)) check_blocks(x, *block_starts, block_rows, row_weight);
}

inline void check_bottleneck_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                      const std::optional<Tensor>& z, const Tensor& W_down, const Tensor& b_down,
                                      const Tensor& W_up, std::string_view activation, double /*scaling*/,
                                      double dropout_p, const std::optional<Tensor>& rng_state,
                                      const std::array<bool, 5>& output_mask) {
  check_kind(activation, "activation");
  check_weights(W_down, b_down, W_up);
  check_features(grad, "grad", W_up, "W_up", 0);
  check_dropout(dropout_p, rng_state, grad, "grad");
  const auto [wants_x, wants_W_down, wants_b_down, wants_W_up, wants_b_up] = output_mask;
  if (given(x)) {
    check_features(*x, "x", W_down, "W_down", 1);
    check_leading(grad, "grad", *x);
  } else {
    TORCH_CHECK_VALUE(!wants_W_down, "x is needed for the gradient of W_down, got None");
  }
  if (given(z)) {
    check_features(*z, "z", W_down, "W_down", 0);
    check_leading(grad, "grad", *z);
  } else {
    TORCH_CHECK_VALUE(given(x) || !(wants_x || wants_b_down || wants_W_up),
                      "x or z is needed for the gradients of x, b_down and W_up, got None");
  }
}

}  // namespace safe_kernels
