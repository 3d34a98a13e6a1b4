#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
Tensor gated_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                        const std::optional<Tensor>& rng_state);

// The same values. A compiler merges equal calls, but not this one with `gated_activation`.
Tensor gated_activation_again(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                              const std::optional<Tensor>& rng_state);

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                     std::string_view kind, double dropout_p,
                                                     const std::optional<Tensor>& rng_state,
                                                     std::array<bool, 2> output_mask);

// Every kernel calls it, so that errors are the same on every backend. Sizes are compared as SymInt, so that
// torch.compile's dynamic shapes stay dynamic.
void check_gated_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                            const std::optional<Tensor>& rng_state);

void check_gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, std::string_view kind,
                                     double dropout_p, const std::optional<Tensor>& rng_state,
                                     const std::array<bool, 2>& output_mask);

}  // namespace safe_kernels
