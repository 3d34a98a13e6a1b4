// What `dropout` retains for backward: 16 bytes of random state, from which the mask is made again; nothing at p = 0.
// The op is linear in x, and its backward is the op itself, so it may be differentiated any number of times.

#include "ops/dropout.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static Variable forward(AutogradContext* ctx, const Tensor& x, double dropout_p, const Tensor& rng_state) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({dropout_p > 0.0 ? rng_state : Tensor()});
    ctx->saved_data["dropout_p"] = dropout_p;
    return dropout(x, dropout_p, rng_state);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    result[0] = dropout_p > 0.0 ? dropout(grads[0], dropout_p, ctx->get_saved_variables()[0]) : grads[0];
    return result;
  }
};

Tensor dropout_autograd(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  check_dropout_op(x, dropout_p, rng_state);
  if (!builds_graph("dropout", x)) return below_autograd([&] { return dropout(x, dropout_p, rng_state); });
  return DropoutFunction::apply(x, dropout_p, rng_state);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) { m.impl("dropout", dropout_autograd); }

}  // namespace safe_kernels
