#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "ops/activation.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline Tensor gated_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                               const std::optional<Tensor>& rng_state) {
  return call_op<gated_activation>("safe_kernels::gated_activation", gate, up, kind, dropout_p, rng_state);
}

// The same values. A compiler merges equal calls, but not this one with `gated_activation`.
inline Tensor gated_activation_again(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                                     const std::optional<Tensor>& rng_state) {
  return call_overload<gated_activation_again>("safe_kernels::gated_activation", "again", gate, up, kind, dropout_p,
                                               rng_state);
}

inline std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                            std::string_view kind, double dropout_p,
                                                            const std::optional<Tensor>& rng_state,
                                                            std::array<bool, 2> output_mask) {
  return call_op<gated_activation_backward>("safe_kernels::gated_activation_backward", grad, gate, up, kind, dropout_p,
                                            rng_state, output_mask);
}

// Every kernel calls it, so that errors are the same on every backend. Sizes are compared as SymInt, so that
// torch.compile's dynamic shapes stay dynamic.
inline void check_gated_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                                   const std::optional<Tensor>& rng_state) {
  check_kind(kind);
  check_has_features(gate, "gate");
  check_has_features(up, "up");
  check_alike(up, "up", gate, "gate");
  check_dropout(dropout_p, rng_state, gate, "gate");
}

inline void check_gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                            std::string_view kind, double dropout_p,
                                            const std::optional<Tensor>& rng_state,
                                            const std::array<bool, 2>& /*output_mask*/) {
  check_gated_activation(gate, up, kind, dropout_p, rng_state);
  check_alike(grad, "grad", gate, "gate");
}

}  // namespace safe_kernels
