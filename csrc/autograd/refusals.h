// Derivatives that the ops do not have, and what they say about it.

#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "checks.h"

namespace safe_kernels {

[[noreturn]] inline void refuse_double_backward(const std::string& backward_op) {
  TORCH_CHECK(false, "safe_kernels::", backward_op.substr(0, backward_op.rfind("_backward")),
              " cannot be differentiated twice: its backward is a fused kernel. "
              "For second derivatives use the layer without the binding (Binding.detach()).");
}

inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& tensor) { return given(tensor) && has_tangent(*tensor); }
template <class NoTensor>
bool has_tangent(const NoTensor& /*argument*/) {
  return false;
}

// Of a call with the op's first arguments, in the schema's order.
template <class... Args>
void refuse_forward_mode(const char* op, const Args&... args) {
  size_t index = 0;
  if (!((has_tangent(args) || (++index, false)) || ...)) return;
  const auto schema = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("safe_kernels::") + op).c_str(), "");
  TORCH_CHECK_NOT_IMPLEMENTED(false, schema.schema().arguments()[index].name(),
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
