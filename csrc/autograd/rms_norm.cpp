// `rms_norm` retains for backward:
//   x or weight requires grad   x and rstd
//   neither                     no node at all
// If only x requires grad and retain_output is true, the output replaces x once a reader retains it.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/graph.h"
#include "autograd/norm_output.h"
#include "autograd/saved.h"
#include "ops/rms_norm.h"

namespace safe_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RmsNormFunction : OpNode<RmsNormFunction, rms_norm> {
  static void save(AutogradContext* ctx, const std::tuple<Tensor, Tensor>& results, const Tensor& x,
                   const Tensor& weight, double /*eps*/, double weight_offset, bool retain_output) {
    announce_reader(x);
    variable_list saved{x, weight, std::get<1>(results)};
    // transformers adds the offset in forward and keeps the sum; a later change of the weight does not affect it.
    if ((retain_output && !weight.requires_grad()) || weight_offset != 0.0) note_parameters(ctx, saved, /*end=*/2);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["weight_offset"] = weight_offset;
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

std::tuple<Tensor, Tensor> rms_norm_autograd(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                             bool retain_output) {
  check_rms_norm(x, weight, eps);
  if (!builds_graph("rms_norm", x, weight))
    return below_autograd([&] { return rms_norm(x, weight, eps, weight_offset, retain_output); });
  auto outputs = RmsNormFunction::apply(x, weight, eps, weight_offset, retain_output);
  if (!weight.requires_grad()) {
    constexpr size_t rstd_at = 2;
    attach_norm_output<RmsNormFunction>(outputs[0], {x, weight, outputs[1]}, retain_output, rstd_at, rstd_at);
  }
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, Autograd, m) {
  m.impl("rms_norm", rms_norm_autograd);
  once_differentiable<rms_norm_backward, check_rms_norm_backward>(m, "rms_norm_backward");
}

}  // namespace safe_kernels
