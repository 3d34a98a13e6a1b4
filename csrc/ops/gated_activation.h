#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes stand in safe_kernels/reference/.
Tensor gated_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                        const std::optional<Tensor>& rng_state);

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                     std::string_view kind, double dropout_p,
                                                     const std::optional<Tensor>& rng_state,
                                                     std::array<bool, 2> output_mask);

// Run by every kernel, so that errors are the same on each way in. Sizes are compared as SymInt, so that a shape that
// torch.compile left open stays open.
void check_gated_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                            const std::optional<Tensor>& rng_state);

void check_gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, std::string_view kind,
                                     double dropout_p, const std::optional<Tensor>& rng_state,
                                     const std::array<bool, 2>& output_mask);

}  // namespace safe_kernels
