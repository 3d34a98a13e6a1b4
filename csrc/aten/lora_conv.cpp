// `lora_conv` in PyTorch's own convolutions and the op `dropout`: one implementation for CPUs and GPUs, since nearly
// all of its time is the convolutions, which stock PEFT calls too.

#include "ops/lora_conv.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"

namespace safe_kernels::aten {

namespace {

// The convolutions of a layer: the base's and lora_A's have the same steps, lora_B's kernel has size 1.
struct Steps {
  std::vector<int64_t> stride, padding, dilation;

  static Steps of_B(size_t positions) {
    return {std::vector<int64_t>(positions, 1), std::vector<int64_t>(positions, 0), std::vector<int64_t>(positions, 1)};
  }

  Tensor apply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t groups) const {
    const std::vector<int64_t> no_output_padding(stride.size(), 0);
    return at::convolution(x, weight, bias, stride, padding, dilation, false, no_output_padding, groups);
  }

  // The gradients of x and weight. For the gradient of x alone, only the shape and strides of x are read.
  std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t groups,
                                      bool wants_x, bool wants_weight) const {
    const std::vector<int64_t> no_output_padding(stride.size(), 0);
    auto [grad_x, grad_weight, none] =
        at::convolution_backward(grad, x, weight, at::OptionalIntArrayRef(), stride, padding, dilation, false,
                                 no_output_padding, groups, {wants_x, wants_weight, false});
    return {grad_x, grad_weight};
  }
};

// The memory format of a convolution's output and of its gradient of x. Some backends give another one.
at::MemoryFormat format_of(const Tensor& x, const Tensor& weight) {
  const auto format = x.suggest_memory_format();
  return format == at::MemoryFormat::Contiguous ? weight.suggest_memory_format() : format;
}

// Dropout gives a contiguous tensor; a convolution follows the memory format of its input.
Tensor dropped(const Tensor& x, int64_t positions, double dropout_p, const std::optional<Tensor>& rng_state) {
  return dropout_p == 0.0
             ? x
             : dropout_of_channels(x, positions, dropout_p, rng_state).contiguous(x.suggest_memory_format());
}

Tensor lora_conv_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                    const Tensor& lora_B, double scaling, at::IntArrayRef stride, at::IntArrayRef padding,
                    at::IntArrayRef dilation, int64_t groups, double dropout_p,
                    const std::optional<Tensor>& rng_state) {
  check_lora_conv(x, weight, bias, lora_A, lora_B, scaling, stride, padding, dilation, groups, dropout_p, rng_state);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t positions = weight.dim() - 2;
  const Steps steps{stride.vec(), padding.vec(), dilation.vec()};
  const auto dtype = x.scalar_type();
  const Tensor input = with_batch(x, positions);
  Tensor out =
      steps.apply(input, weight.to(dtype), given(bias) ? std::optional(bias->to(dtype)) : std::nullopt, groups);
  const Tensor h =
      steps.apply(dropped(input.to(lora_A.scalar_type()), positions, dropout_p, rng_state), lora_A, std::nullopt, 1);
  out.add_(Steps::of_B(stride.size()).apply(h, lora_B, std::nullopt, groups), scaling);
  out = out.contiguous(format_of(input, weight));
  return x.dim() == out.dim() ? out : out.squeeze(0);
}

std::tuple<Tensor, Tensor, Tensor> lora_conv_backward_of(
    const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, c10::SymIntArrayRef x_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double dropout_p, const std::optional<Tensor>& rng_state,
    std::array<bool, 3> output_mask) {
  check_lora_conv_backward(grad, x, weight, lora_A, lora_B, scaling, x_size, stride, padding, dilation, groups,
                           dropout_p, rng_state, output_mask);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto [wants_x, wants_A, wants_B] = output_mask;
  const int64_t positions = weight.dim() - 2;
  const Steps steps{stride.vec(), padding.vec(), dilation.vec()};
  const auto dtype = lora_A.scalar_type();
  const Tensor grads = with_batch(grad, positions), inner = grads.to(dtype);
  const auto format = format_of(given(x) ? with_batch(*x, positions) : grads, weight);
  std::vector<int64_t> size = C10_AS_INTARRAYREF_SLOW(x_size).vec(), h_size = grads.sizes().vec();
  if (static_cast<int64_t>(size.size()) < grads.dim()) size.insert(size.begin(), 1);
  h_size[1] = lora_A.size(0);
  // Tensors that backward recomputes; if their values are not read, only tensors of the same shapes.
  const bool reads_x = wants_A || wants_B;
  const Tensor y = reads_x ? dropped(with_batch(*x, positions).to(dtype), positions, dropout_p, rng_state)
                           : at::empty(size, inner.options().memory_format(format));
  const Tensor h =
      wants_B ? steps.apply(y, lora_A, std::nullopt, 1) : at::empty(h_size, inner.options().memory_format(format));
  auto [grad_h, grad_B] = Steps::of_B(stride.size()).backward(inner, h, lora_B, groups, wants_x || wants_A, wants_B);
  Tensor grad_x = at::empty({0}, grad.options()), grad_A = at::empty({0}, lora_A.options());
  if (wants_B) {
    grad_B = grad_B.mul_(scaling).contiguous();
  } else {
    grad_B = at::empty({0}, lora_B.options());
  }
  if (wants_x || wants_A) {
    auto [grad_y, of_A] = steps.backward(grad_h.mul_(scaling), y, lora_A, 1, wants_x, wants_A);
    if (wants_A) grad_A = of_A.contiguous();
    if (wants_x) {
      const Tensor like_x = dtype == grad.scalar_type() ? y : at::empty(size, grads.options().memory_format(format));
      grad_x = std::get<0>(steps.backward(grads, like_x, weight.to(grad.scalar_type()), groups, true, false));
      grad_x.add_(dropout_of_channels(grad_y, positions, dropout_p, rng_state));
      grad_x = grad_x.contiguous(format);
      if (grad_x.dim() != grad.dim()) grad_x = grad_x.squeeze(0);
    }
  }
  return {grad_x, grad_A, grad_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("lora_conv", lora_conv_of);
  m.impl("lora_conv_backward", lora_conv_backward_of);
}

TORCH_LIBRARY_IMPL(safe_kernels, CUDA, m) {
  m.impl("lora_conv", lora_conv_of);
  m.impl("lora_conv_backward", lora_conv_backward_of);
}

}  // namespace safe_kernels::aten
