// `bottleneck` retains for backward the first of these that applies, by the arguments that require grad when the graph
// is built. z is the pre-activation. The weights come with each, and with dropout 16 bytes of random state:
//   W_down               x or its replacement (adapter_input.h); z is recomputed
//   W_up, and x or b_down    z, r numbers per row
//   W_up                 the hidden units with dropout, r numbers per row, and no random state
//   x or b_down          z; for a ReLU one bit per number, which shows where a gradient passes
//   residual or b_up     only the weights
//   none of them         no node at all

#include "ops/bottleneck.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/adapter_input.h"
#include "autograd/graph.h"
#include "autograd/saved.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// uint8 [..., ceil(r / 8)]: whether a gradient passes; nan lets it pass, as in the activation's backward.
Tensor pack_signs(const Tensor& z) {
  const auto r = z.sym_size(-1), bytes = (r + 7) / 8;
  c10::SymDimVector sizes(z.sym_sizes().begin(), z.sym_sizes().end());
  sizes.back() = bytes;
  sizes.push_back(8);
  const Tensor passes = at::constant_pad_nd_symint(z.le(0).logical_not().to(at::kByte), {0, bytes * 8 - r});
  const Tensor places = at::arange(8, passes.options());
  return passes.reshape_symint(sizes).bitwise_left_shift(places).sum(-1, /*keepdim=*/false, at::kByte);
}

// Numbers [..., r] with these signs.
Tensor unpack_signs(const Tensor& bits, const c10::SymInt& r, at::ScalarType dtype) {
  const Tensor places = at::arange(8, bits.options());
  const Tensor passes = bits.unsqueeze(-1).bitwise_right_shift(places).bitwise_and(1).flatten(-2);
  return passes.narrow_symint(-1, 0, r).to(dtype).mul(2).sub(1);
}

// z in the dtype of the output of PEFT's layer down.
Tensor as_kept(const Tensor& z, const Tensor& W_down) {
  const auto dtype = dtype_that_peft_reads(W_down);
  return c10::elementSize(dtype) < static_cast<size_t>(z.element_size()) ? z.to(dtype) : z;
}

struct BottleneckFunction : OpNode<BottleneckFunction, bottleneck> {
  static void save(AutogradContext* ctx, const std::tuple<Tensor, Tensor, Tensor>& results, const Tensor& x,
                   const Tensor& /*residual*/, const Tensor& W_down, const Tensor& b_down, const Tensor& W_up,
                   const Tensor& /*b_up*/, std::string_view activation, double scaling, double dropout_p,
                   const std::optional<Tensor>& rng_state, const std::optional<Tensor>& /*block_starts*/,
                   int64_t /*block_rows*/, const std::optional<Tensor>& /*row_weight*/) {
    const auto& [out, z, statistics] = results;
    const bool needs_x = W_down.requires_grad(), needs_value = !needs_x && W_up.requires_grad();
    const bool needs_slope = !needs_x && !needs_value && (x.requires_grad() || b_down.requires_grad());
    const bool keeps_signs = needs_slope && activation == "relu";
    variable_list saved(6);
    for (size_t i = 0; i < 3; ++i) saved[2 + i] = as_read(i == 0 ? W_down : i == 1 ? b_down : W_up);
    const bool only_up = needs_value && !x.requires_grad() && !b_down.requires_grad();
    if (needs_x) {
      keep_adapter_input(ctx, saved, x, W_down, /*only_B=*/false, 0.0, std::nullopt, /*may_cast=*/true);
    } else if (needs_value || needs_slope) {
      saved[1] = below_autograd([&] {
        if (only_up) return as_kept(safe_kernels::activation(z, activation, dropout_p, rng_state), W_down);
        return keeps_signs ? pack_signs(z) : as_kept(z, W_down);
      });
    }
    if (only_up) ctx->saved_data["is_hidden"] = true;
    const bool makes_mask = dropout_p > 0.0 && !only_up && (needs_x || needs_value || needs_slope);
    if (makes_mask) saved[5] = *rng_state;
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = makes_mask ? dropout_p : 0.0;
    ctx->saved_data["keeps_signs"] = keeps_signs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(13);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    result[1] = grad;
    // Indices of needs_input_grad count tensor arguments: x, residual, W_down, b_down, W_up, b_up.
    const std::array<size_t, 5> places{0, 2, 3, 4, 5};
    std::array<bool, 5> wanted{};
    for (size_t i = 0; i < 5; ++i) wanted[i] = ctx->needs_input_grad(places[i]);
    if (std::none_of(wanted.begin(), wanted.end(), [](bool one) { return one; })) return result;
    const auto saved = unpack_saved(ctx, ADAPTER_INPUT_WRITTEN_TO);
    const Tensor x = adapter_input(ctx, saved, 6), W_down = saved[2];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    if (wanted[3] && keeps_hidden(ctx)) {
      result[4] = grad_of_B(grad, saved[1], W_down, saved[4], scaling);
      wanted[3] = false;
    }
    Tensor z = keeps_hidden(ctx) ? Tensor() : saved[1];
    if (ctx->saved_data["keeps_signs"].toBool()) z = unpack_signs(z, W_down.sym_size(0), W_down.scalar_type());
    auto found = bottleneck_backward(grad, or_none(x), or_none(z), W_down, saved[3], saved[4],
                                     ctx->saved_data["activation"].toStringRef(), scaling,
                                     ctx->saved_data["dropout_p"].toDouble(), or_none(saved[5]), wanted);
    const auto [grad_x, grad_W_down, grad_b_down, grad_W_up, grad_b_up] = found;
    const std::array<Tensor, 5> made{grad_x, grad_W_down, grad_b_down, grad_W_up, grad_b_up};
    for (size_t i = 0; i < 5; ++i)
      if (wanted[i]) result[places[i]] = made[i];
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  differentiable<bottleneck, check_bottleneck, BottleneckFunction>(m, "bottleneck");
  once_differentiable<bottleneck_backward, check_bottleneck_backward>(m, "bottleneck_backward");
}

}  // namespace safe_kernels
