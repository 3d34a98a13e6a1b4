// Derivatives that the ops do not have, and what they say about it.

#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "checks.h"

namespace safe_kernels {

[[noreturn]] inline void refuse_double_backward(const char* op) {
  TORCH_CHECK(false, "safe_kernels::", op,
              " cannot be differentiated twice: its backward is a fused kernel. "
              "For second derivatives use the layer without the binding (Binding.detach()).");
}

inline void refuse_forward_mode(const std::optional<at::Tensor>& tensor, const char* name, const char* op) {
  if (!given(tensor)) return;
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor->_fw_grad(/*level=*/0).defined(), name,
                              " has a forward-mode tangent, but safe_kernels::", op,
                              " has no forward-mode derivative; use reverse mode");
}

// Asked where a node is about to be made: PyTorch refuses it there too, without a word about whose node it is.
inline void refuse_transforms(const char* op) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms == nullptr) return;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "safe_kernels::", op,
                                " has no derivative inside torch.func's transforms; use torch.autograd.grad, or the "
                                "layer without the binding (Binding.detach()).");
  }
}

}  // namespace safe_kernels
