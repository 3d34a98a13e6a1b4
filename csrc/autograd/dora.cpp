// `dora` retains for backward, by the arguments that require grad when the graph is built:
//   lora_A, lora_B or magnitude   x or its replacement (adapter_input.h), 16 bytes of random state; the next row
//   x                             weight, A, B, magnitude, the norm (one number per row of weight), the random state
//   bias only                     nothing
//   none of them                  no node at all
// The products with weight are computed again for the gradient of magnitude, and the norm is a constant, as in PEFT.

#include "ops/dora.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/adapter_input.h"
#include "autograd/graph.h"
#include "autograd/saved.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct DoraFunction : OpNode<DoraFunction, dora> {
  static void save(AutogradContext* ctx, const std::tuple<Tensor, Tensor>& results, const Tensor& x,
                   const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
                   const Tensor& magnitude, double scaling, double dropout_p, const std::optional<Tensor>& rng_state) {
    TORCH_CHECK_VALUE(!weight.requires_grad(), "weight must not require grad: dora makes no gradient for it");
    const bool only_B = !lora_A.requires_grad() && !magnitude.requires_grad();
    const bool adapter_trains = !only_B || lora_B.requires_grad();
    variable_list saved(7);
    if (adapter_trains || x.requires_grad())
      saved = {Tensor(),           as_read(weight),      as_read(lora_A), as_read(lora_B),
               as_read(magnitude), std::get<1>(results), Tensor()};
    if (adapter_trains) keep_adapter_input(ctx, saved, x, lora_A, only_B, dropout_p, rng_state, /*may_cast=*/false);
    const bool makes_mask = dropout_p > 0.0 && (x.requires_grad() || (adapter_trains && !keeps_hidden(ctx)));
    if (makes_mask) saved[6] = *rng_state;
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(9);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    // Indices of needs_input_grad count tensor arguments: x, weight, bias (if given), A, B, magnitude.
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const size_t A = has_bias ? 3 : 2;
    if (has_bias && ctx->needs_input_grad(2)) result[2] = grad.reshape_symint({-1, grad.sym_size(-1)}).sum(0);
    std::array<bool, 4> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(A), ctx->needs_input_grad(A + 1),
                               ctx->needs_input_grad(A + 2)};
    const auto saved = unpack_saved(ctx, ADAPTER_INPUT_WRITTEN_TO);
    const Tensor x = adapter_input(ctx, saved, 7);
    const double scaling = ctx->saved_data["scaling"].toDouble();
    if (wanted[2] && keeps_hidden(ctx)) {
      const Tensor scale = (saved[4] / saved[5]).unsqueeze(1);
      result[4] = grad_of_B(grad, saved[0], saved[2], saved[3], scaling) * scale;
      wanted[2] = false;
    }
    if (!wanted[0] && !wanted[1] && !wanted[2] && !wanted[3]) return result;
    auto [grad_x, grad_A, grad_B, grad_magnitude] =
        dora_backward(grad, or_none(x), saved[1], saved[2], saved[3], saved[4], saved[5], scaling,
                      ctx->saved_data["dropout_p"].toDouble(), or_none(saved[6]), wanted);
    if (wanted[0]) result[0] = grad_x;
    if (wanted[1]) result[3] = grad_A;
    if (wanted[2]) result[4] = grad_B;
    if (wanted[3]) result[5] = grad_magnitude;
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  differentiable<dora, check_dora, DoraFunction>(m, "dora");
  once_differentiable<dora_backward, check_dora_backward>(m, "dora_backward");
}

}  // namespace safe_kernels
