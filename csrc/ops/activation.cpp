#include "ops/activation.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m, "activation(Tensor x, str kind, float dropout_p=0., Tensor? rng_state=None) -> Tensor");
  define_op(m, "activation.again(Tensor x, str kind, float dropout_p, Tensor? rng_state) -> Tensor");
  m.impl("activation.again", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(activation));
  define_op(m, "activation_backward(Tensor grad, Tensor x, str kind, float dropout_p, Tensor? rng_state) -> Tensor");
}

}  // namespace safe_kernels
