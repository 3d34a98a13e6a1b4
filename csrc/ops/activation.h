#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline Tensor activation(const Tensor& x, std::string_view kind, double dropout_p,
                         const std::optional<Tensor>& rng_state) {
  return call_op<activation>("safe_kernels::activation", x, kind, dropout_p, rng_state);
}

// The same values. A compiler merges equal calls, but not this one with `activation`.
inline Tensor activation_again(const Tensor& x, std::string_view kind, double dropout_p,
                               const std::optional<Tensor>& rng_state) {
  return call_overload<activation_again>("safe_kernels::activation", "again", x, kind, dropout_p, rng_state);
}

inline Tensor activation_backward(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                                  const std::optional<Tensor>& rng_state) {
  return call_op<activation_backward>("safe_kernels::activation_backward", grad, x, kind, dropout_p, rng_state);
}

// Every kernel calls it, so that errors are the same on every backend. Sizes are compared as SymInt, so that
// torch.compile's dynamic shapes stay dynamic.
inline void check_kind(std::string_view kind, const char* name = "kind") {
  TORCH_CHECK_VALUE(kind == "silu" || kind == "gelu" || kind == "gelu_tanh" || kind == "relu", name,
                    " must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', got '", std::string(kind), "'");
}

inline void check_activation(const Tensor& x, std::string_view kind, double dropout_p,
                             const std::optional<Tensor>& rng_state) {
  check_kind(kind);
  check_has_features(x, "x");
  check_dropout(dropout_p, rng_state, x, "x");
}

inline void check_activation_backward(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                                      const std::optional<Tensor>& rng_state) {
  check_activation(x, kind, dropout_p, rng_state);
  check_alike(grad, "grad", x, "x");
}

}  // namespace safe_kernels
