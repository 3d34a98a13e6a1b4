// What the ops share where their graph is built.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "checks.h"

namespace safe_kernels {

inline bool requires_grad(const std::optional<Tensor>& tensor) { return given(tensor) && tensor->requires_grad(); }

// Whether a call with these differentiable arguments gets a node.
inline bool builds_graph(std::initializer_list<std::optional<Tensor>> arguments) {
  if (!at::GradMode::is_enabled()) return false;
  for (const auto& argument : arguments)
    if (requires_grad(argument)) return true;
  return false;
}

inline void refuse_forward_mode(const Tensor& tensor, const char* name, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), name,
                              " has a forward-mode tangent, but safe_kernels::", op,
                              " has no forward-mode derivative; use reverse mode");
}

[[noreturn]] inline void refuse_double_backward(const char* op) {
  TORCH_CHECK(
      false, "safe_kernels::", op,
      " cannot be differentiated twice: its backward is a fused kernel. "
      "For second derivatives use the layer without the binding (Binding.detach()), or PyTorch's own operations.");
}

}  // namespace safe_kernels
