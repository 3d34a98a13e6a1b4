#include "ops/activation.h"

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

void check_kind(std::string_view kind, const char* name) {
  TORCH_CHECK_VALUE(kind == "silu" || kind == "gelu" || kind == "gelu_tanh" || kind == "relu", name,
                    " must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', got '", std::string(kind), "'");
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

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m, "activation(Tensor x, str kind, float dropout_p=0., Tensor? rng_state=None) -> Tensor");
  define_op(m, "activation.again(Tensor x, str kind, float dropout_p, Tensor? rng_state) -> Tensor");
  m.impl("activation.again", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(activation));
  define_op(m, "activation_backward(Tensor grad, Tensor x, str kind, float dropout_p, Tensor? rng_state) -> Tensor");
}

}  // namespace safe_kernels
