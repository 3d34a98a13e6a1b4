// `lora` retains for backward, by the arguments that require grad when the graph is built:
//   lora_A or lora_B   x or its replacement (adapter_input.h), 16 bytes of random state, A, B
//   x                  A, B, and the random state
//   base only          nothing
//   none of them       no node at all

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/adapter_input.h"
#include "autograd/graph.h"
#include "autograd/saved.h"
#include "ops/lora.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LoraFunction : OpNode<LoraFunction, lora> {
  static void save(AutogradContext* ctx, const std::tuple<Tensor, Tensor>& /*results*/, const Tensor& x,
                   const Tensor& /*base*/, const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                   const std::optional<Tensor>& rng_state, const std::optional<Tensor>& /*block_starts*/,
                   int64_t /*block_rows*/, const std::optional<Tensor>& /*row_weight*/) {
    const bool adapter_trains = lora_A.requires_grad() || lora_B.requires_grad();
    const bool any = adapter_trains || x.requires_grad();
    variable_list saved{Tensor(), any ? as_read(lora_A) : Tensor(), any ? as_read(lora_B) : Tensor(), Tensor()};
    if (adapter_trains)
      keep_adapter_input(ctx, saved, x, lora_A, !lora_A.requires_grad(), dropout_p, rng_state, /*may_cast=*/true);
    const bool makes_mask = dropout_p > 0.0 && (x.requires_grad() || (adapter_trains && !keeps_hidden(ctx)));
    if (makes_mask) saved[3] = *rng_state;
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(10);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    result[1] = grad;
    // Indices of needs_input_grad count tensor arguments: x, base, lora_A, lora_B.
    std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(2), ctx->needs_input_grad(3)};
    if (!wanted[0] && !wanted[1] && !wanted[2]) return result;
    const auto saved = unpack_saved(ctx, ADAPTER_INPUT_WRITTEN_TO);
    const Tensor x = adapter_input(ctx, saved, 4);
    const double scaling = ctx->saved_data["scaling"].toDouble();
    if (wanted[2] && keeps_hidden(ctx)) {
      result[3] = grad_of_B(grad, saved[0], saved[1], saved[2], scaling);
      wanted[2] = false;
      if (!wanted[0]) return result;
    }
    auto [grad_x, grad_A, grad_B] = lora_backward(grad, or_none(x), saved[1], saved[2], scaling,
                                                  ctx->saved_data["dropout_p"].toDouble(), or_none(saved[3]), wanted);
    if (wanted[0]) result[0] = grad_x;
    if (wanted[1]) result[2] = grad_A;
    if (wanted[2]) result[3] = grad_B;
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  differentiable<lora, check_lora, LoraFunction>(m, "lora");
  once_differentiable<lora_backward, check_lora_backward>(m, "lora_backward");
}

}  // namespace safe_kernels
