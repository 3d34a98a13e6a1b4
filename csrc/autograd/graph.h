// Whether a call gets a node.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <initializer_list>
#include <optional>

namespace safe_kernels {

using at::Tensor;

inline bool requires_grad(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->requires_grad();
}

// Of a call with these differentiable arguments.
inline bool builds_graph(std::initializer_list<std::optional<Tensor>> arguments) {
  if (!at::GradMode::is_enabled()) return false;
  for (const auto& argument : arguments)
    if (requires_grad(argument)) return true;
  return false;
}

// Calls an op's kernel from a node's forward. Tensors are saved outside of this: hooks that take them make aliases,
// which share no count of versions below autograd.
template <class Call>
auto below_autograd(Call call) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}

}  // namespace safe_kernels
