// `rotary` retains cos and sin, which all layers of a model share, and nothing of its own.
// The op is linear in x and its backward is the transposed op, so it may be differentiated any number of times.

#include "ops/rotary.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RotaryFunction : OpNode<RotaryFunction, rotary> {
  static void save(AutogradContext* ctx, const Tensor& /*out*/, const Tensor& /*x*/, const Tensor& cos,
                   const Tensor& sin, bool transposed) {
    TORCH_CHECK_NOT_IMPLEMENTED(!cos.requires_grad() && !sin.requires_grad(), cos.requires_grad() ? "cos" : "sin",
                                " must not require grad: safe_kernels::rotary has a gradient for x only; detach it");
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["transposed"] = transposed;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    result[0] = rotary(grads[0], saved[0], saved[1], !ctx->saved_data["transposed"].toBool());
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) { differentiable<rotary, check_rotary, RotaryFunction>(m, "rotary"); }

}  // namespace safe_kernels
