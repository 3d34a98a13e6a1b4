#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
Tensor activation(const Tensor& x, std::string_view kind, double dropout_p, const std::optional<Tensor>& rng_state);

// The same values. A compiler merges equal calls, but not this one with `activation`.
Tensor activation_again(const Tensor& x, std::string_view kind, double dropout_p,
                        const std::optional<Tensor>& rng_state);

Tensor activation_backward(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                           const std::optional<Tensor>& rng_state);

// Every kernel calls it, so that errors are the same on every backend. Sizes are compared as SymInt, so that
// torch.compile's dynamic shapes stay dynamic.
void check_kind(std::string_view kind, const char* name = "kind");

void check_activation(const Tensor& x, std::string_view kind, double dropout_p, const std::optional<Tensor>& rng_state);

void check_activation_backward(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                               const std::optional<Tensor>& rng_state);

}  // namespace safe_kernels
