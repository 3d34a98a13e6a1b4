// `rotary` retains cos and sin, which all layers of a model share, and nothing of its own.
// The op is linear in x and its backward is the transposed op, so it may be differentiated any number of times.

#include "ops/rotary.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct RotaryFunction : torch::autograd::Function<RotaryFunction> {
  static Variable forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin,
                          bool transposed) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["transposed"] = transposed;
    return below_autograd([&] { return rotary(x, cos, sin, transposed); });
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    result[0] = rotary(grads[0], saved[0], saved[1], !ctx->saved_data["transposed"].toBool());
    return result;
  }
};

Tensor rotary_autograd(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  check_rotary(x, cos, sin);
  const bool needs_node = builds_graph("rotary", x, cos, sin);
  TORCH_CHECK_NOT_IMPLEMENTED(!needs_node || (!cos.requires_grad() && !sin.requires_grad()),
                              cos.requires_grad() ? "cos" : "sin",
                              " must not require grad: safe_kernels::rotary has a gradient for x only; detach it");
  if (!needs_node) return below_autograd([&] { return rotary(x, cos, sin, transposed); });
  return RotaryFunction::apply(x, cos, sin, transposed);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) { m.impl("rotary", rotary_autograd); }

}  // namespace safe_kernels
