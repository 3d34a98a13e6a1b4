// `lora_linear` retains for backward, by the arguments that require grad when the graph is built:
//   weight, lora_A or lora_B   x or its replacement (adapter_input.h), 16 bytes of random state, weight, A, B
//   x                          weight, A, B, and the random state
//   bias only                  weight, A, B
//   none of them               no node at all
// The layer's output without the adapter is never stored, so it is not retained either.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/adapter_input.h"
#include "autograd/graph.h"
#include "autograd/saved.h"
#include "ops/lora_linear.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LoraLinearFunction : OpNode<LoraLinearFunction, lora_linear> {
  static void save(AutogradContext* ctx, const std::tuple<Tensor, Tensor>& /*results*/, const Tensor& x,
                   const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
                   double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                   const std::optional<Tensor>& /*block_starts*/, int64_t /*block_rows*/,
                   const std::optional<Tensor>& /*row_weight*/) {
    const bool reads_x = weight.requires_grad() || lora_A.requires_grad() || lora_B.requires_grad();
    const bool drops = dropout_p > 0.0 && (x.requires_grad() || lora_A.requires_grad() || lora_B.requires_grad());
    const bool only_B = !weight.requires_grad() && !lora_A.requires_grad();
    variable_list saved{Tensor(), as_read(weight), as_read(lora_A), as_read(lora_B), Tensor()};
    // If the base layer's weight trains, its gradient needs x without dropout; PyTorch keeps x too then.
    const double input_dropout_p = weight.requires_grad() ? 0.0 : dropout_p;
    if (reads_x)
      keep_adapter_input(ctx, saved, x, lora_A, only_B, input_dropout_p, rng_state,
                         /*may_cast=*/!weight.requires_grad());
    const bool makes_mask = drops && (x.requires_grad() || !keeps_hidden(ctx));
    if (makes_mask) saved[4] = *rng_state;
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = makes_mask ? dropout_p : 0.0;
    ctx->saved_data["has_bias"] = given(bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(11);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    // Indices of needs_input_grad count tensor arguments: x, weight, bias (if given), A, B.
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const size_t A = has_bias ? 3 : 2;
    std::array<bool, 5> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), has_bias && ctx->needs_input_grad(2),
                               ctx->needs_input_grad(A), ctx->needs_input_grad(A + 1)};
    const auto saved = unpack_saved(ctx, ADAPTER_INPUT_WRITTEN_TO);
    const Tensor x = adapter_input(ctx, saved, 5);
    const double scaling = ctx->saved_data["scaling"].toDouble();
    if (wanted[4] && keeps_hidden(ctx)) {
      result[4] = grad_of_B(grad, saved[0], saved[2], saved[3], scaling);
      wanted[4] = false;
    }
    auto [grad_x, grad_weight, grad_bias, grad_A, grad_B] =
        lora_linear_backward(grad, or_none(x), saved[1], saved[2], saved[3], scaling,
                             ctx->saved_data["dropout_p"].toDouble(), or_none(saved[4]), wanted);
    const std::array<Tensor, 5> made{grad_x, grad_weight, grad_bias, grad_A, grad_B};
    for (size_t i = 0; i < made.size(); ++i)
      if (wanted[i]) result[i] = made[i];
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  differentiable<lora_linear, check_lora_linear, LoraLinearFunction>(m, "lora_linear");
  once_differentiable<lora_linear_backward, check_lora_linear_backward>(m, "lora_linear_backward");
}

}  // namespace safe_kernels
