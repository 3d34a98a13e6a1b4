#include "ops/gated_activation.h"

namespace safe_kernels {

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
