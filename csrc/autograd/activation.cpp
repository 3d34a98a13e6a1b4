// `activation` retains for backward: x, the pre-activation, and with dropout 16 bytes of random state. A ReLU retains
// its output, as PyTorch's does: its zeros show where no gradient passes, and a layer after it retains it anyway. If x
// does not require grad, there is no node.

#include "ops/activation.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"
#include "autograd/norm_output.h"
#include "autograd/recipe.h"
#include "autograd/saved.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool retains_output(std::string_view kind) { return kind == "relu"; }

struct ActivationFunction : OpNode<ActivationFunction, activation> {
  static void save(AutogradContext* ctx, const Tensor& out, const Tensor& x, std::string_view kind, double dropout_p,
                   const std::optional<Tensor>& rng_state) {
    if (!retains_output(kind)) announce_reader(x);
    ctx->save_for_backward({retains_output(kind) ? out : x, dropout_p > 0.0 ? *rng_state : Tensor()});
    ctx->saved_data["kind"] = std::string(kind);
    ctx->saved_data["dropout_p"] = dropout_p;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return result;
    const auto saved = unpack_saved(ctx, PRE_ACTIVATION_WRITTEN_TO);
    result[0] = activation_backward(grads[0], saved[0], ctx->saved_data["kind"].toStringRef(),
                                    ctx->saved_data["dropout_p"].toDouble(), or_none(saved[1]));
    return result;
  }
};

Tensor activation_autograd(const Tensor& x, std::string_view kind, double dropout_p,
                           const std::optional<Tensor>& rng_state) {
  check_activation(x, kind, dropout_p, rng_state);
  if (!builds_graph("activation", x)) return below_autograd([&] { return activation(x, kind, dropout_p, rng_state); });
  Tensor out = ActivationFunction::apply(x, kind, dropout_p, rng_state)[0];
  if (!retains_output(kind)) attach_recipe(out, x, Tensor(), kind, dropout_p, rng_state);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  m.impl("activation", activation_autograd);
  once_differentiable<activation_backward, check_activation_backward>(m, "activation_backward");
}

}  // namespace safe_kernels
