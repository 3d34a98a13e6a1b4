// Decides whether a call gets a node, refuses derivatives that the ops do not have, and makes the node of a recorded
// backward (create_graph=True).

#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace safe_kernels {

using at::Tensor;

[[noreturn]] inline void refuse_double_backward(const std::string& backward_op) {
  TORCH_CHECK(false, "safe_kernels::", backward_op.substr(0, backward_op.rfind("_backward")),
              " cannot be differentiated twice: its backward is a fused kernel. "
              "For second derivatives use the layer without the binding (Binding.detach()).");
}

inline bool has_tangent(const Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<Tensor>& tensor) { return given(tensor) && has_tangent(*tensor); }
template <class NoTensor>
bool has_tangent(const NoTensor& /*argument*/) {
  return false;
}

// `args` are the op's first arguments, in the schema's order.
template <class... Args>
void refuse_forward_mode(const char* op, const Args&... args) {
  size_t index = 0;
  if (!((has_tangent(args) || (++index, false)) || ...)) return;
  const auto schema = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("safe_kernels::") + op).c_str(), "");
  TORCH_CHECK_NOT_IMPLEMENTED(false, schema.schema().arguments()[index].name(),
                              " has a forward-mode tangent, but safe_kernels::", op,
                              " has no forward-mode derivative; use reverse mode");
}

// Called before a node is made. PyTorch refuses it later too, but its error does not name the op.
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

inline bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool requires_grad(const std::optional<Tensor>& tensor) { return given(tensor) && tensor->requires_grad(); }
template <class NoTensor>
bool requires_grad(const NoTensor& /*argument*/) {
  return false;
}

// Refuses unsupported derivatives. `op` is the schema's name, `args` its first arguments, in order.
template <class... Args>
bool builds_graph(const char* op, const Args&... args) {
  refuse_forward_mode(op, args...);
  if (!at::GradMode::is_enabled() || !(requires_grad(args) || ...)) return false;
  refuse_transforms(op);
  return true;
}

// Calls an op's kernel from a node's forward. Tensors must be saved outside of this call: saved-tensor hooks make
// aliases, and below autograd an alias does not share the version counter.
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

// A node that calls `op` in forward. `Kind::save(ctx, results, arguments...)` saves what backward needs. Only the
// first result has a derivative.
template <class Kind, auto op>
struct OpNode;

template <class Kind, class Results, class... Args, Results (*op)(Args...)>
struct OpNode<Kind, op> : torch::autograd::Function<Kind> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, Args... args) {
    Results results = below_autograd([&] { return op(args...); });
    auto outputs = std::apply([](auto&... each) { return torch::autograd::variable_list{each...}; }, each_of(results));
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable(torch::autograd::variable_list(outputs.begin() + 1, outputs.end()));
    Kind::save(ctx, results, args...);
    return outputs;
  }
};

// The Autograd kernel of an op: the op alone, or a node of kind `Function` if the graph needs one.
template <auto op, auto check, class Function>
struct Differentiable;

template <class Results, class... Args, Results (*op)(Args...), auto check, class Function>
struct Differentiable<op, check, Function> {
  static inline const char* name = nullptr;  // constant-initialised: no later initialiser resets it after registration

  static Results call(Args... args) {
    check(args...);
    if (!builds_graph(name, args...)) return below_autograd([&] { return op(args...); });
    const auto outputs = Function::apply(args...);
    Results results;
    size_t i = 0;
    std::apply([&](auto&... each) { ((each = outputs[i++]), ...); }, each_of(results));
    return results;
  }
};

// Usage: differentiable<lora, check_lora, LoraFunction>(m, "lora").
template <auto op, auto check, class Function>
void differentiable(torch::Library& m, const char* name) {
  using Kernel = Differentiable<op, check, Function>;
  Kernel::name = name;
  m.impl(name, Kernel::call);
}

// The node of `backward_op`, whose results have no derivative. It is in the graph only if backward is recorded
// (create_graph=True). Without it PyTorch would treat the results as constants, and a second derivative would be
// silently wrong. torch::autograd::autogradNotImplementedFallback() makes such a node too, but it cannot check the
// arguments, and its error does not say that a second derivative was requested or how to avoid it.
template <auto backward_op, auto check>
struct OnceDifferentiable;

template <class Results, class... Args, Results (*backward_op)(Args...), auto check>
struct OnceDifferentiable<backward_op, check> : torch::autograd::Function<OnceDifferentiable<backward_op, check>> {
  using Kernel = Differentiable<backward_op, check, OnceDifferentiable>;

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* /*ctx*/, Args... args) {
    Results results = below_autograd([&] { return backward_op(args...); });
    return std::apply([](auto&... each) { return torch::autograd::variable_list{each...}; }, each_of(results));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*ctx*/,
                                                 const torch::autograd::variable_list& /*grads*/) {
    refuse_double_backward(Kernel::name);
  }
};

// Usage: once_differentiable<lora_backward, check_lora_backward>(m, "lora_backward").
template <auto backward_op, auto check>
void once_differentiable(torch::Library& m, const char* name) {
  differentiable<backward_op, check, OnceDifferentiable<backward_op, check>>(m, name);
}

}  // namespace safe_kernels
