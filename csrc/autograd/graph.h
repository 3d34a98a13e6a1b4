// Whether a call gets a node, and the node of a backward that is itself recorded.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "autograd/refusals.h"

namespace safe_kernels {

using at::Tensor;

inline bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool requires_grad(const std::optional<Tensor>& tensor) { return tensor.has_value() && requires_grad(*tensor); }
template <class NoTensor>
bool requires_grad(const NoTensor& /*argument*/) {
  return false;
}

// Refuses the derivatives that no op has. `op` is the schema's name, `args` its first arguments, in order.
template <class... Args>
bool builds_graph(const char* op, const Args&... args) {
  refuse_forward_mode(op, args...);
  if (!at::GradMode::is_enabled() || !(requires_grad(args) || ...)) return false;
  refuse_transforms(op);
  return true;
}

// Calls an op's kernel from a node's forward. Tensors are saved outside of this: hooks that take them make aliases,
// which share no count of versions below autograd.
template <class Call>
auto below_autograd(Call call) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}

inline auto each_of(Tensor& result) { return std::tie(result); }
template <class... Tensors>
auto each_of(std::tuple<Tensors...>& results) {
  return std::apply([](Tensors&... each) { return std::tie(each...); }, results);
}

// The Autograd kernel of `backward_op`, whose results have no derivative. Its node is in the graph only while a
// backward is itself recorded (create_graph=True): without it PyTorch would treat the results as constants, and a
// second derivative would be silently wrong. torch::autograd::autogradNotImplementedFallback() makes such a node too,
// but has no room for the checks of the arguments, and its error ("derivative for ... is not implemented") does not say
// that a second derivative was asked for, nor what to do.
template <auto backward_op, auto check>
struct OnceDifferentiable;

template <class Results, class... Args, Results (*backward_op)(Args...), auto check>
struct OnceDifferentiable<backward_op, check> : torch::autograd::Function<OnceDifferentiable<backward_op, check>> {
  static inline const char* name = nullptr;  // a constant, which no initialiser resets after registration

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* /*ctx*/, Args... args) {
    Results results = below_autograd([&] { return backward_op(args...); });
    return std::apply([](auto&... each) { return torch::autograd::variable_list{each...}; }, each_of(results));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*ctx*/,
                                                 const torch::autograd::variable_list& /*grads*/) {
    refuse_double_backward(name);
  }

  static Results call(Args... args) {
    check(args...);
    if (!builds_graph(name, args...)) return below_autograd([&] { return backward_op(args...); });
    const auto outputs = OnceDifferentiable::apply(args...);
    Results results;
    size_t i = 0;
    std::apply([&](auto&... each) { ((each = outputs[i++]), ...); }, each_of(results));
    return results;
  }
};

// Registers it: once_differentiable<lora_backward, check_lora_backward>(m, "lora_backward").
template <auto backward_op, auto check>
void once_differentiable(torch::Library& m, const char* name) {
  using Kernel = OnceDifferentiable<backward_op, check>;
  Kernel::name = name;
  m.impl(name, Kernel::call);
}

}  // namespace safe_kernels
