#include "ops/activation.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace safe_kernels {

void check_kind(std::string_view kind) {
  TORCH_CHECK_VALUE(kind == "silu" || kind == "gelu" || kind == "gelu_tanh" || kind == "relu",
                    "kind must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', got '", std::string(kind), "'");
}

void check_activation(const Tensor& x, std::string_view kind, double dropout_p,
                      const std::optional<Tensor>& rng_state) {
  check_kind(kind);
  check_has_features(x, "x");
  check_dropout(dropout_p, rng_state, x, "x");
}

void check_activation_backward(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                               const std::optional<Tensor>& rng_state) {
  check_activation(x, kind, dropout_p, rng_state);
  check_alike(grad, "grad", x, "x");
}

Tensor activation(const Tensor& x, std::string_view kind, double dropout_p, const std::optional<Tensor>& rng_state) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("safe_kernels::activation", "").typed<decltype(activation)>();
  return op.call(x, kind, dropout_p, rng_state);
}

Tensor activation_backward(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                           const std::optional<Tensor>& rng_state) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("safe_kernels::activation_backward", "")
                             .typed<decltype(activation_backward)>();
  return op.call(grad, x, kind, dropout_p, rng_state);
}

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  m.def("activation(Tensor x, str kind, float dropout_p=0., Tensor? rng_state=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("activation_backward(Tensor grad, Tensor x, str kind, float dropout_p, Tensor? rng_state) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace safe_kernels
