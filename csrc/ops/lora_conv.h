#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <array>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline Tensor lora_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                        const Tensor& lora_B, double scaling, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t groups, double dropout_p,
                        const std::optional<Tensor>& rng_state) {
  return call_op<lora_conv>("safe_kernels::lora_conv", x, weight, bias, lora_A, lora_B, scaling, stride, padding,
                            dilation, groups, dropout_p, rng_state);
}

inline std::tuple<Tensor, Tensor, Tensor> lora_conv_backward(
    const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, c10::SymIntArrayRef x_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double dropout_p, const std::optional<Tensor>& rng_state,
    std::array<bool, 3> output_mask) {
  return call_op<lora_conv_backward>("safe_kernels::lora_conv_backward", grad, x, weight, lora_A, lora_B, scaling,
                                     x_size, stride, padding, dilation, groups, dropout_p, rng_state, output_mask);
}

// Throws an error that names the argument if a call is wrong on every backend.
void check_lora_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                     const Tensor& lora_B, double scaling, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, double dropout_p,
                     const std::optional<Tensor>& rng_state);

void check_lora_conv_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight,
                              const Tensor& lora_A, const Tensor& lora_B, double scaling, c10::SymIntArrayRef x_size,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              double dropout_p, const std::optional<Tensor>& rng_state,
                              const std::array<bool, 3>& output_mask);

// dropout(x) for a convolution over the last `positions` dimensions of x: a row of the mask is a channel of a sample.
Tensor dropout_of_channels(const Tensor& x, int64_t positions, double dropout_p,
                           const std::optional<Tensor>& rng_state);

// [N, C, ...], with N = 1 for a tensor [C, ...] without a batch.
Tensor with_batch(const Tensor& tensor, int64_t positions);

}  // namespace safe_kernels
