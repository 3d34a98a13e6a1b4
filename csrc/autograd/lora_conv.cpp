// `lora_conv` retains for backward, by the arguments that require grad when the graph is built:
//   lora_A     x or its replacement (adapter_input.h), 16 bytes of random state, weight, A, B
//   only lora_B of the adapter   h = dropout(x) * A, r channels, A, B; for the gradient of x as in the next row
//   x          weight, A, B, the random state, and the numbers of the shape of x
//   bias only  nothing
//   none of them   no node at all
// PyTorch's convolution saves its input even if its weight is frozen; with PEFT, a frozen lora_A does this too.

#include "ops/lora_conv.h"

#include <ATen/ops/convolution.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "autograd/adapter_input.h"
#include "autograd/graph.h"
#include "autograd/saved.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// One argument of the node: autograd would count each number of a list as an argument.
struct ConvSteps {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// h = dropout(x) * A, as lora_B reads it.
Tensor hidden_channels(const Tensor& x, const Tensor& lora_A, const ConvSteps& steps, double dropout_p,
                       const std::optional<Tensor>& rng_state) {
  const int64_t positions = lora_A.dim() - 2;
  const Tensor y =
      dropout_of_channels(with_batch(x, positions).to(lora_A.scalar_type()), positions, dropout_p, rng_state);
  const std::vector<int64_t> no_output_padding(positions, 0);
  const Tensor h = at::convolution(y, lora_A, std::nullopt, steps.stride, steps.padding, steps.dilation, false,
                                   no_output_padding, 1);
  return h.dim() == x.dim() ? h : h.squeeze(0);
}

// The gradient of lora_B from h, computed as for an adapter with input h and the identity as lora_A.
Tensor grad_of_B_from_channels(const Tensor& grad, const Tensor& h, const Tensor& lora_A, const Tensor& lora_B,
                               double scaling, int64_t groups) {
  const std::vector<int64_t> ones(lora_A.dim() - 2, 1), zeros(lora_A.dim() - 2, 0);
  Tensor identity = at::diag_embed(lora_A.new_ones_symint({lora_A.sym_size(0)}));
  for (size_t i = 0; i < ones.size(); ++i) identity = identity.unsqueeze(-1);
  return std::get<2>(lora_conv_backward(grad, h, lora_B, identity, lora_B, scaling, h.sym_sizes(), ones, zeros, ones,
                                        groups, 0.0, std::nullopt, {false, false, true}));
}

Tensor sum_of_channels(const Tensor& grad, int64_t positions) {
  std::vector<int64_t> others;
  for (int64_t i = 0; i < grad.dim(); ++i)
    if (i != grad.dim() - positions - 1) others.push_back(i);
  return grad.sum(others);
}

struct LoraConvFunction : torch::autograd::Function<LoraConvFunction> {
  static Variable forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                          const ConvSteps& steps, double dropout_p, const std::optional<Tensor>& rng_state) {
    Tensor out = below_autograd([&] {
      return lora_conv(x, weight, bias, lora_A, lora_B, scaling, steps.stride, steps.padding, steps.dilation,
                       steps.groups, dropout_p, rng_state);
    });
    ctx->set_materialize_grads(false);
    const bool adapter_trains = lora_A.requires_grad() || lora_B.requires_grad();
    variable_list saved(5);
    if (adapter_trains || x.requires_grad())
      saved = {Tensor(), as_read(weight), as_read(lora_A), as_read(lora_B), Tensor()};
    if (adapter_trains && !lora_A.requires_grad() && find_recipe(x) == nullptr) {
      saved[0] = hidden_channels(x, lora_A, steps, dropout_p, rng_state);
      ctx->saved_data["is_hidden"] = true;
    } else if (adapter_trains) {
      keep_adapter_input(ctx, saved, x, lora_A, /*only_B=*/false, dropout_p, rng_state, /*may_cast=*/true);
    }
    const bool makes_mask = dropout_p > 0.0 && (x.requires_grad() || (adapter_trains && !keeps_hidden(ctx)));
    if (makes_mask) saved[4] = *rng_state;
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["x_size"] = x.sym_sizes();
    ctx->saved_data["stride"] = steps.stride;
    ctx->saved_data["padding"] = steps.padding;
    ctx->saved_data["dilation"] = steps.dilation;
    ctx->saved_data["groups"] = steps.groups;
    ctx->saved_data["dropout_p"] = makes_mask ? dropout_p : 0.0;
    ctx->saved_data["has_bias"] = given(bias);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(9);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    auto& data = ctx->saved_data;
    const auto stride = data["stride"].toIntVector();
    // Indices of needs_input_grad count tensor arguments: x, weight, bias (if given), A, B.
    const bool has_bias = data["has_bias"].toBool();
    const size_t A = has_bias ? 3 : 2;
    if (has_bias && ctx->needs_input_grad(2)) result[2] = sum_of_channels(grad, static_cast<int64_t>(stride.size()));
    std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(A), ctx->needs_input_grad(A + 1)};
    const auto saved = unpack_saved(ctx, ADAPTER_INPUT_WRITTEN_TO);
    const Tensor x = adapter_input(ctx, saved, 5);
    const double scaling = data["scaling"].toDouble();
    const int64_t groups = data["groups"].toInt();
    if (wanted[2] && keeps_hidden(ctx)) {
      result[4] = grad_of_B_from_channels(grad, saved[0], saved[2], saved[3], scaling, groups);
      wanted[2] = false;
    }
    if (!wanted[0] && !wanted[1] && !wanted[2]) return result;
    const auto x_size = data["x_size"].toSymIntVector();
    auto [grad_x, grad_A, grad_B] = lora_conv_backward(
        grad, or_none(x), saved[1], saved[2], saved[3], scaling, x_size, stride, data["padding"].toIntVector(),
        data["dilation"].toIntVector(), groups, data["dropout_p"].toDouble(), or_none(saved[4]), wanted);
    if (wanted[0]) result[0] = grad_x;
    if (wanted[1]) result[3] = grad_A;
    if (wanted[2]) result[4] = grad_B;
    return result;
  }
};

Tensor lora_conv_autograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Tensor& lora_A, const Tensor& lora_B, double scaling, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double dropout_p,
                          const std::optional<Tensor>& rng_state) {
  check_lora_conv(x, weight, bias, lora_A, lora_B, scaling, stride, padding, dilation, groups, dropout_p, rng_state);
  if (!builds_graph("lora_conv", x, weight, bias, lora_A, lora_B))
    return below_autograd([&] {
      return lora_conv(x, weight, bias, lora_A, lora_B, scaling, stride, padding, dilation, groups, dropout_p,
                       rng_state);
    });
  TORCH_CHECK_VALUE(!weight.requires_grad(), "weight must not require grad: lora_conv makes no gradient for it");
  return LoraConvFunction::apply(x, weight, bias, lora_A, lora_B, scaling, ConvSteps{stride, padding, dilation, groups},
                                 dropout_p, rng_state);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  m.impl("lora_conv", lora_conv_autograd);
  once_differentiable<lora_conv_backward, check_lora_conv_backward>(m, "lora_conv_backward");
}

}  // namespace safe_kernels
