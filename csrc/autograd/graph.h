// What the ops share where their graph is built.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <initializer_list>
#include <optional>

namespace safe_kernels {

using at::Tensor;

inline bool requires_grad(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->requires_grad();
}

// Whether a call with these differentiable arguments gets a node.
inline bool builds_graph(std::initializer_list<std::optional<Tensor>> arguments) {
  if (!at::GradMode::is_enabled()) return false;
  for (const auto& argument : arguments)
    if (requires_grad(argument)) return true;
  return false;
}

inline void check_no_forward_mode(const Tensor& tensor, const char* name, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), name,
                              " has a forward-mode tangent, but safe_kernels::", op,
                              " has no forward-mode derivative; use reverse mode");
}

}  // namespace safe_kernels
