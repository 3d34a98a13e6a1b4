// What `activation` retains for backward: x, the pre-activation, and 16 bytes of random state with dropout. A ReLU
// retains its output, as PyTorch's does: where that is zero no gradient passes, and a layer after it retains it anyway.
// When x does not require grad there is no node.

#include "ops/activation.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"
#include "autograd/norm_output.h"
#include "autograd/recipe.h"
#include "autograd/refusals.h"
#include "autograd/saved.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

bool retains_output(std::string_view kind) { return kind == "relu"; }

struct ActivationFunction : torch::autograd::Function<ActivationFunction> {
  static Variable forward(AutogradContext* ctx, const Tensor& x, std::string_view kind, double dropout_p,
                          const std::optional<Tensor>& rng_state) {
    ctx->set_materialize_grads(false);
    Tensor out = below_autograd([&] { return activation(x, kind, dropout_p, rng_state); });
    if (!retains_output(kind)) announce_reader(x);
    ctx->save_for_backward({retains_output(kind) ? out : x, dropout_p > 0.0 ? *rng_state : Tensor()});
    ctx->saved_data["kind"] = std::string(kind);
    ctx->saved_data["dropout_p"] = dropout_p;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return result;
    const auto saved = unpack_saved(ctx, PRE_ACTIVATION_WRITTEN_TO);
    const auto rng_state = saved[1].defined() ? std::optional(saved[1]) : std::nullopt;
    result[0] = activation_backward(grads[0], saved[0], ctx->saved_data["kind"].toStringRef(),
                                    ctx->saved_data["dropout_p"].toDouble(), rng_state);
    return result;
  }
};

// Stands in the graph only while a backward is itself recorded (create_graph=True): PyTorch would
// otherwise treat the kernel's result as a constant, and a second derivative would be silently wrong.
struct ActivationBackwardFunction : torch::autograd::Function<ActivationBackwardFunction> {
  static Variable forward(AutogradContext* /*ctx*/, const Tensor& grad, const Tensor& x, std::string_view kind,
                          double dropout_p, const std::optional<Tensor>& rng_state) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return activation_backward(grad, x, kind, dropout_p, rng_state);
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    refuse_double_backward("activation");
  }
};

Tensor activation_autograd(const Tensor& x, std::string_view kind, double dropout_p,
                           const std::optional<Tensor>& rng_state) {
  check_activation(x, kind, dropout_p, rng_state);
  refuse_forward_mode(x, "x", "activation");
  if (!builds_graph({x})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return activation(x, kind, dropout_p, rng_state);
  }
  refuse_transforms("activation");
  Tensor out = ActivationFunction::apply(x, kind, dropout_p, rng_state);
  if (!retains_output(kind)) attach_recipe(out, x, Tensor(), kind, dropout_p, rng_state);
  return out;
}

Tensor activation_backward_autograd(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                                    const std::optional<Tensor>& rng_state) {
  check_activation_backward(grad, x, kind, dropout_p, rng_state);
  refuse_forward_mode(grad, "grad", "activation_backward");
  refuse_forward_mode(x, "x", "activation_backward");
  if (!builds_graph({grad, x})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return activation_backward(grad, x, kind, dropout_p, rng_state);
  }
  return ActivationBackwardFunction::apply(grad, x, kind, dropout_p, rng_state);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  m.impl("activation", activation_autograd);
  m.impl("activation_backward", activation_backward_autograd);
}

}  // namespace safe_kernels
