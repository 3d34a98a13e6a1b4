// What `rms_norm` retains for backward, decided while the graph is built:
//   x or weight requires grad   x and rstd
//   neither                     no node at all
// Where only x does and retain_output is true, the output takes the place of x once a reader retains it anyway.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"
#include "autograd/norm_output.h"
#include "autograd/refusals.h"
#include "autograd/saved.h"
#include "ops/rms_norm.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps,
                               double weight_offset, bool retain_output) {
    auto [out, rstd] = below_autograd([&] { return rms_norm(x, weight, eps, weight_offset, retain_output); });
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({rstd});
    announce_reader(x);
    variable_list saved{x, weight, rstd};
    // transformers adds an offset in forward and keeps the sum, which a later change of the weight does not reach.
    if ((retain_output && !weight.requires_grad()) || weight_offset != 0.0) note_parameters(ctx, saved, /*end=*/2);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["weight_offset"] = weight_offset;
    return {out, rstd};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);
    if (!grads[0].defined()) return result;
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    if (!wanted[0] && !wanted[1]) return result;
    const auto saved = unpack_saved(ctx, NORM_WRITTEN_TO);
    const bool from_output = is_from_output(saved[0], saved[2]);
    const double weight_offset = ctx->saved_data["weight_offset"].toDouble();
    if (from_output || weight_offset != 0.0) check_parameters(ctx, saved, /*end=*/2);
    auto [grad_x, grad_weight] = rms_norm_backward(
        grads[0], saved[0], saved[1], from_output ? saved[2].squeeze(0) : saved[2], weight_offset, from_output, wanted);
    if (wanted[0]) result[0] = grad_x;
    if (wanted[1]) result[1] = grad_weight;
    return result;
  }
};

// Stands in the graph only while a backward is itself recorded (create_graph=True); see LoraBackwardFunction.
struct RmsNormBackwardFunction : torch::autograd::Function<RmsNormBackwardFunction> {
  static variable_list forward(AutogradContext* /*ctx*/, const Tensor& grad, const Tensor& retained,
                               const Tensor& weight, const Tensor& rstd, double weight_offset, bool from_output,
                               std::array<bool, 2> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_x, grad_weight] =
        rms_norm_backward(grad, retained, weight, rstd, weight_offset, from_output, output_mask);
    return {grad_x, grad_weight};
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    refuse_double_backward("rms_norm");
  }
};

std::tuple<Tensor, Tensor> rms_norm_autograd(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                             bool retain_output) {
  check_rms_norm(x, weight, eps);
  refuse_forward_mode(x, "x", "rms_norm");
  refuse_forward_mode(weight, "weight", "rms_norm");
  if (!builds_graph({x, weight})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rms_norm(x, weight, eps, weight_offset, retain_output);
  }
  refuse_transforms("rms_norm");
  auto outputs = RmsNormFunction::apply(x, weight, eps, weight_offset, retain_output);
  if (!weight.requires_grad()) {
    constexpr size_t rstd_at = 2;
    attach_norm_output<RmsNormFunction>(outputs[0], {x, weight, outputs[1]}, retain_output, rstd_at, rstd_at);
  }
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> rms_norm_backward_autograd(const Tensor& grad, const Tensor& retained, const Tensor& weight,
                                                      const Tensor& rstd, double weight_offset, bool from_output,
                                                      std::array<bool, 2> output_mask) {
  check_rms_norm_backward(grad, retained, weight, rstd);
  refuse_forward_mode(grad, "grad", "rms_norm_backward");
  refuse_forward_mode(retained, "retained", "rms_norm_backward");
  refuse_forward_mode(weight, "weight", "rms_norm_backward");
  if (!builds_graph({grad, retained, weight})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rms_norm_backward(grad, retained, weight, rstd, weight_offset, from_output, output_mask);
  }
  auto outputs = RmsNormBackwardFunction::apply(grad, retained, weight, rstd, weight_offset, from_output, output_mask);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  m.impl("rms_norm", rms_norm_autograd);
  m.impl("rms_norm_backward", rms_norm_backward_autograd);
}

}  // namespace safe_kernels
