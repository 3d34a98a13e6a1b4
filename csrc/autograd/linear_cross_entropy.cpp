// `linear_cross_entropy` retains for backward:
//   x requires grad   the gradient of each row's loss for x, in the dtype of x
//   otherwise         no node at all
// It has no gradient of weight and bias. The incoming gradient has one number per row, so backward is one product.

#include "ops/linear_cross_entropy.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rounded once: the factor, such as 1 / tokens, stays in the dtype of the losses.
Tensor scale_rows(const Tensor& factors, const Tensor& grad_x) {
  return grad_x.mul(factors.unsqueeze(-1)).to(grad_x.scalar_type());
}

void check_nothing(const Tensor& /*factors*/, const Tensor& /*grad_x*/) {}

using ScaleRows = OnceDifferentiable<scale_rows, check_nothing>::Kernel;

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Tensor& target, int64_t ignore_index,
                               double scaling, double softcap) {
    TORCH_CHECK_VALUE(!weight.requires_grad() && !requires_grad(bias), weight.requires_grad() ? "weight" : "bias",
                      " must not require grad: linear_cross_entropy makes no gradient for it");
    auto [loss, grad_x] = below_autograd(
        [&] { return linear_cross_entropy_backward(x, weight, bias, target, ignore_index, scaling, softcap); });
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_x});
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(7);
    if (!grads[0].defined()) return result;
    Tensor grad_x = ctx->get_saved_variables()[0];
    // An ignored row has no gradient, even if the incoming gradient is not finite, such as 1 / 0 tokens.
    const Tensor factors = grads[0].masked_fill(grad_x.eq(0).all(-1), 0.0);
    // The retained gradient depends on x; a recorded backward (create_graph=True) must take this into account.
    if (at::GradMode::is_enabled()) grad_x = grad_x.detach().set_requires_grad(true);
    result[0] = ScaleRows::call(factors, grad_x);
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  ScaleRows::name = "linear_cross_entropy_backward";
  differentiable<linear_cross_entropy, check_linear_cross_entropy, LinearCrossEntropyFunction>(m,
                                                                                               "linear_cross_entropy");
  once_differentiable<linear_cross_entropy_backward, check_linear_cross_entropy>(m, "linear_cross_entropy_backward");
}

}  // namespace safe_kernels
