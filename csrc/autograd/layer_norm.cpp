// `layer_norm` retains for backward:
//   x, weight or bias requires grad   x, rstd, and mean if `keeps_mean`
//   none of them                      no node at all
// If only x requires grad and retain_output is true, the output replaces x and mean once a reader retains it.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"
#include "autograd/norm_output.h"
#include "autograd/saved.h"
#include "checks.h"
#include "ops/layer_norm.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor or_undefined(const std::optional<Tensor>& tensor) { return given(tensor) ? *tensor : Tensor(); }

// On a CPU PyTorch's statistics have the weight's dtype. If it has 16 bits, PyTorch's two take the bytes of our rstd.
bool keeps_mean(const Tensor& x, const std::optional<Tensor>& weight) {
  return !x.is_cpu() || !at::isReducedFloatingType(x.scalar_type()) ||
         (given(weight) && !at::isReducedFloatingType(weight->scalar_type()));
}

variable_list to_save(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                      const Tensor& mean, const Tensor& rstd) {
  return {x, or_undefined(weight), or_undefined(bias), keeps_mean(x, weight) ? mean : Tensor(), rstd};
}

struct LayerNormFunction : OpNode<LayerNormFunction, layer_norm> {
  static void save(AutogradContext* ctx, const std::tuple<Tensor, Tensor, Tensor>& results, const Tensor& x,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double /*eps*/,
                   bool retain_output) {
    const auto& [out, mean, rstd] = results;
    announce_reader(x);
    variable_list saved = to_save(x, weight, bias, mean, rstd);
    if (retain_output && !requires_grad(weight) && !requires_grad(bias)) note_parameters(ctx, saved, /*end=*/3);
    ctx->save_for_backward(std::move(saved));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);
    if (!grads[0].defined()) return result;
    const auto saved = unpack_saved(ctx, NORM_WRITTEN_TO);
    const auto weight = or_none(saved[1]), bias = or_none(saved[2]);
    // Indices of needs_input_grad count only the given tensors.
    const size_t bias_index = weight.has_value() ? 2 : 1;
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), weight.has_value() && ctx->needs_input_grad(1),
                                     bias.has_value() && ctx->needs_input_grad(bias_index)};
    if (!wanted[0] && !wanted[1] && !wanted[2]) return result;
    const bool from_output = is_from_output(saved[0], saved[4]);
    if (from_output) check_parameters(ctx, saved, /*end=*/3);
    std::optional<Tensor> mean;
    if (!from_output) mean = saved[3].defined() ? saved[3] : saved[0].mean(-1, /*keepdim=*/false, at::kFloat);
    auto [grad_x, grad_weight, grad_bias] = layer_norm_backward(
        grads[0], saved[0], weight, bias, mean, from_output ? saved[4].squeeze(0) : saved[4], from_output, wanted);
    if (wanted[0]) result[0] = grad_x;
    if (wanted[1]) result[1] = grad_weight;
    if (wanted[2]) result[2] = grad_bias;
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_autograd(const Tensor& x, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, double eps,
                                                       bool retain_output) {
  check_layer_norm(x, weight, bias, eps);
  if (!builds_graph("layer_norm", x, weight, bias))
    return below_autograd([&] { return layer_norm(x, weight, bias, eps, retain_output); });
  auto outputs = LayerNormFunction::apply(x, weight, bias, eps, retain_output);
  if (!requires_grad(weight) && !requires_grad(bias)) {
    constexpr size_t mean_at = 3, rstd_at = 4;
    attach_norm_output<LayerNormFunction>(outputs[0], to_save(x, weight, bias, outputs[1], outputs[2]), retain_output,
                                          mean_at, rstd_at);
  }
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  m.impl("layer_norm", layer_norm_autograd);
  once_differentiable<layer_norm_backward, check_layer_norm_backward>(m, "layer_norm_backward");
}

}  // namespace safe_kernels
