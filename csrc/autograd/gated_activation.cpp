// `gated_activation` retains for backward, by the arguments that require grad when the graph is built:
//   gate         gate, up, and with dropout 16 bytes of random state
//   up only      gate and the random state; backward recomputes act(gate)
//   none         no node at all

#include "ops/gated_activation.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"
#include "autograd/recipe.h"
#include "autograd/saved.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct GatedActivationFunction : OpNode<GatedActivationFunction, gated_activation> {
  static void save(AutogradContext* ctx, const Tensor& /*out*/, const Tensor& gate, const Tensor& up,
                   std::string_view kind, double dropout_p, const std::optional<Tensor>& rng_state) {
    ctx->save_for_backward({gate, gate.requires_grad() ? up : Tensor(), dropout_p > 0.0 ? *rng_state : Tensor()});
    ctx->saved_data["kind"] = std::string(kind);
    ctx->saved_data["dropout_p"] = dropout_p;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    if (!grads[0].defined() || (!wanted[0] && !wanted[1])) return result;
    const auto saved = unpack_saved(ctx, PRE_ACTIVATION_WRITTEN_TO);
    const Tensor& gate = saved[0];
    const Tensor& up = saved[1].defined() ? saved[1] : gate;  // not read when the gradient of gate is not wanted
    auto [grad_gate, grad_up] =
        gated_activation_backward(grads[0], gate, up, ctx->saved_data["kind"].toStringRef(),
                                  ctx->saved_data["dropout_p"].toDouble(), or_none(saved[2]), wanted);
    if (wanted[0]) result[0] = grad_gate;
    if (wanted[1]) result[1] = grad_up;
    return result;
  }
};

Tensor gated_activation_autograd(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                                 const std::optional<Tensor>& rng_state) {
  check_gated_activation(gate, up, kind, dropout_p, rng_state);
  if (!builds_graph("gated_activation", gate, up))
    return below_autograd([&] { return gated_activation(gate, up, kind, dropout_p, rng_state); });
  Tensor out = GatedActivationFunction::apply(gate, up, kind, dropout_p, rng_state)[0];
  // If up is not retained anyway, a reader needs less memory for the output than for a recipe.
  if (gate.requires_grad()) attach_recipe(out, gate, up, kind, dropout_p, rng_state);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  m.impl("gated_activation", gated_activation_autograd);
  once_differentiable<gated_activation_backward, check_gated_activation_backward>(m, "gated_activation_backward");
}

}  // namespace safe_kernels
