// `dropout` retains 16 bytes of random state for backward, from which it recomputes the mask; nothing if p = 0.
// The op is linear in x and its own backward, so it may be differentiated any number of times.

#include "ops/dropout.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct DropoutFunction : OpNode<DropoutFunction, dropout> {
  static void save(AutogradContext* ctx, const Tensor& /*out*/, const Tensor& /*x*/, double dropout_p,
                   const Tensor& rng_state) {
    ctx->save_for_backward({dropout_p > 0.0 ? rng_state : Tensor()});
    ctx->saved_data["dropout_p"] = dropout_p;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    result[0] = dropout_p > 0.0 ? dropout(grads[0], dropout_p, ctx->get_saved_variables()[0]) : grads[0];
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  differentiable<dropout, check_dropout_op, DropoutFunction>(m, "dropout");
}

}  // namespace safe_kernels
