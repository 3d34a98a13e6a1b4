// Saving a node's tensors, and errors after an in-place write to one of them.

#pragma once

#include <ATen/FunctionalTensorWrapper.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>

namespace safe_kernels {

inline constexpr char NORM_WRITTEN_TO[] =
    "A bound norm (safe_kernels) keeps its input, or instead its output if a layer that trains keeps that too. "
    "Write to a clone of that tensor, or leave norms as they are: safe_peft.bind(model, parts=...) without \"norms\".";
inline constexpr char ADAPTER_INPUT_WRITTEN_TO[] =
    "A bound adapter layer (safe_kernels) keeps its input x, or the inputs of the activation that made x, and with "
    "dropout recomputes the mask in backward. Write to a clone of that tensor, or use the layer without the binding "
    "(Binding.detach()).";
inline constexpr char PRE_ACTIVATION_WRITTEN_TO[] =
    "A bound activation (safe_kernels) keeps its input, and a ReLU its output. Write to a clone of that tensor, or "
    "leave activations as they are: safe_peft.bind(model, parts=...) without \"mlps\".";

// A weight as forward reads it, to be saved. If `parameter.data` is replaced before backward (as by `model.half()`),
// the saved values stay, as in PyTorch's linear layers, which save a view. In-place writes are detected.
inline at::Tensor as_read(const at::Tensor& weight) {
  auto* impl = weight.unsafeGetTensorImpl();
  if (impl->is_python_dispatch() || weight.is_inference() || at::functionalization::impl::isFunctionalTensor(weight))
    return weight;
  at::Tensor alias(impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/false));
  return alias.set_requires_grad(weight.requires_grad());  // a recorded backward depends on it
}

// Unpacks the saved tensors. If autograd finds a changed version, `words` explains the tensor and the fix.
inline torch::autograd::variable_list unpack_saved(const torch::autograd::AutogradContext* ctx, const char* words) {
  try {
    return ctx->get_saved_variables();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    TORCH_CHECK(message.find("inplace operation") == std::string::npos, message, " ", words);
    throw;
  }
}

}  // namespace safe_kernels
