#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "ops/dropout.h"

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

inline void check_steps(at::IntArrayRef steps, const char* name, int64_t positions, int64_t least) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(steps.size()) == positions, name, " must have ", positions,
                    " numbers, one per dimension of the kernel, got ", steps);
  for (const int64_t step : steps)
    TORCH_CHECK_VALUE(step >= least, name, " must be at least ", least, " everywhere, got ", steps);
}

inline void check_kernels(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_floating(weight, "weight");
  check_floating(lora_A, "lora_A");
  check_floating(lora_B, "lora_B");
  TORCH_CHECK_VALUE(weight.dim() >= 3 && weight.dim() <= 5,
                    "weight must have shape [d_out, d_in / groups, *kernel] with 1 to 3 dimensions of the kernel, got ",
                    weight.sym_sizes());
  const int64_t positions = weight.dim() - 2;
  check_steps(stride, "stride", positions, 1);
  check_steps(padding, "padding", positions, 0);
  check_steps(dilation, "dilation", positions, 1);
  TORCH_CHECK_VALUE(groups >= 1 && weight.sym_size(0) % groups == 0, "groups must divide d_out of weight ",
                    weight.sym_sizes(), ", got ", groups);
  TORCH_CHECK_VALUE(lora_A.dim() == weight.dim() && lora_A.sym_size(1) == weight.sym_size(1) * groups &&
                        lora_A.sym_sizes().slice(2) == weight.sym_sizes().slice(2),
                    "lora_A must have shape [r, ", weight.sym_size(1) * groups, ", *kernel] with the kernel of weight ",
                    weight.sym_sizes(), ", got ", lora_A.sym_sizes());
  bool is_pointwise = lora_B.dim() == weight.dim();
  for (int64_t i = 2; is_pointwise && i < lora_B.dim(); ++i) is_pointwise = lora_B.sym_size(i) == 1;
  TORCH_CHECK_VALUE(
      is_pointwise && lora_B.sym_size(0) == weight.sym_size(0) && lora_B.sym_size(1) * groups == lora_A.sym_size(0),
      "lora_B must have shape [", weight.sym_size(0), ", r / groups] and a kernel of size 1, for lora_A ",
      lora_A.sym_sizes(), " and ", groups, " groups, got ", lora_B.sym_sizes());
  TORCH_CHECK_TYPE(lora_A.scalar_type() == lora_B.scalar_type(), "lora_A and lora_B must have one dtype, got ",
                   lora_A.scalar_type(), " and ", lora_B.scalar_type());
  check_device(lora_A, "lora_A", weight, "weight");
  check_device(lora_B, "lora_B", weight, "weight");
}

inline void check_channels(const Tensor& tensor, const char* name, const Tensor& weight, const c10::SymInt& channels) {
  check_floating(tensor, name);
  const int64_t positions = weight.dim() - 2;
  TORCH_CHECK_VALUE(
      (tensor.dim() == positions + 1 || tensor.dim() == positions + 2) && tensor.sym_size(-positions - 1) == channels,
      name, " must have shape [..., ", channels, "] and ", positions, " dimensions of positions, for weight ",
      weight.sym_sizes(), ", got ", tensor.sym_sizes());
  check_device(tensor, name, weight, "weight");
}

// PyTorch's kernels do not check that grad is as large as the output for such an input.
inline void check_x_size(c10::SymIntArrayRef x_size, const Tensor& grad, const Tensor& lora_A, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation) {
  const size_t positions = stride.size(), first = x_size.size() - positions;
  bool fits = static_cast<int64_t>(x_size.size()) == grad.dim() && x_size[first - 1] == lora_A.sym_size(1);
  for (size_t i = 0; fits && i + 1 < first; ++i) fits = x_size[i] == grad.sym_size(i);
  for (size_t i = 0; fits && i < positions; ++i) {
    const c10::SymInt free = x_size[first + i] + 2 * padding[i] - dilation[i] * (lora_A.sym_size(2 + i) - 1) - 1;
    fits = free >= 0 && free / stride[i] + 1 == grad.sym_size(first + i);
  }
  TORCH_CHECK_VALUE(fits, "x_size must be the shape of an input whose output has the shape of grad, ", grad.sym_sizes(),
                    ", got ", x_size);
}

// Throws an error that names the argument if a call is wrong on every backend.
inline void check_lora_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Tensor& lora_A, const Tensor& lora_B, double /*scaling*/, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double dropout_p,
                            const std::optional<Tensor>& rng_state) {
  check_kernels(weight, lora_A, lora_B, stride, padding, dilation, groups);
  check_channels(x, "x", weight, lora_A.sym_size(1));
  if (given(bias)) check_per_output(*bias, "bias", weight, "weight");
  check_dropout(dropout_p, rng_state, x, "x");
}

inline void check_lora_conv_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight,
                                     const Tensor& lora_A, const Tensor& lora_B, double /*scaling*/,
                                     c10::SymIntArrayRef x_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                     at::IntArrayRef dilation, int64_t groups, double dropout_p,
                                     const std::optional<Tensor>& rng_state, const std::array<bool, 3>& output_mask) {
  check_kernels(weight, lora_A, lora_B, stride, padding, dilation, groups);
  check_channels(grad, "grad", weight, weight.sym_size(0));
  check_dropout(dropout_p, rng_state, grad, "grad");
  if (given(x)) {
    check_channels(*x, "x", weight, lora_A.sym_size(1));
    TORCH_CHECK_VALUE(x->sym_sizes() == x_size, "x must have the shape x_size, ", x_size, ", got ", x->sym_sizes());
  } else {
    TORCH_CHECK_VALUE(!output_mask[1] && !output_mask[2],
                      "x is needed for the gradients of lora_A and lora_B, got None");
  }
  check_x_size(x_size, grad, lora_A, stride, padding, dilation);
}

// dropout(x) for a convolution over the last `positions` dimensions of x: a row of the mask is a channel of a sample.
inline Tensor dropout_of_channels(const Tensor& x, int64_t positions, double dropout_p,
                                  const std::optional<Tensor>& rng_state) {
  if (dropout_p == 0.0) return x;
  const Tensor rows = dropout(x.flatten(-positions), dropout_p, *rng_state);
  return rows.reshape_symint(x.sym_sizes());
}

// [N, C, ...], with N = 1 for a tensor [C, ...] without a batch.
inline Tensor with_batch(const Tensor& tensor, int64_t positions) {
  return tensor.dim() == positions + 2 ? tensor : tensor.unsqueeze(0);
}

}  // namespace safe_kernels
