#include "ops/gated_activation.h"

#include "checks.h"
#include "dispatch.h"
#include "ops/activation.h"

namespace safe_kernels {

void check_gated_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                            const std::optional<Tensor>& rng_state) {
  check_kind(kind);
  check_has_features(gate, "gate");
  check_has_features(up, "up");
  check_alike(up, "up", gate, "gate");
  check_dropout(dropout_p, rng_state, gate, "gate");
}

void check_gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, std::string_view kind,
                                     double dropout_p, const std::optional<Tensor>& rng_state,
                                     const std::array<bool, 2>& /*output_mask*/) {
  check_gated_activation(gate, up, kind, dropout_p, rng_state);
  check_alike(grad, "grad", gate, "gate");
}

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "gated_activation(Tensor gate, Tensor up, str kind, float dropout_p=0., Tensor? rng_state=None) -> Tensor");
  define_op(m,
            "gated_activation.again(Tensor gate, Tensor up, str kind, float dropout_p, Tensor? rng_state) -> Tensor");
  m.impl("gated_activation.again", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(gated_activation));
  define_op(
      m,
      "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str kind, float dropout_p, Tensor? rng_state, "
      "bool[2] output_mask) -> (Tensor grad_gate, Tensor grad_up)");
}

}  // namespace safe_kernels
