// dropout(act(gate) * up) on a CPU: see activation.cpp.

#include "ops/gated_activation.h"

#include <torch/library.h>

#include "cpu/activations.h"

namespace safe_kernels::cpu {

namespace {

Tensor gated_activation_cpu(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                            const std::optional<Tensor>& rng_state) {
  check_gated_activation(gate, up, kind, dropout_p, rng_state);
  return run_activation(gate, up, kind, dropout_p, rng_state);
}

std::tuple<Tensor, Tensor> gated_activation_backward_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                         std::string_view kind, double dropout_p,
                                                         const std::optional<Tensor>& rng_state,
                                                         std::array<bool, 2> output_mask) {
  check_gated_activation_backward(grad, gate, up, kind, dropout_p, rng_state, output_mask);
  return run_activation_backward(grad, gate, up, kind, dropout_p, rng_state, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("gated_activation", gated_activation_cpu);
  m.impl("gated_activation_backward", gated_activation_backward_cpu);
}

}  // namespace safe_kernels::cpu
