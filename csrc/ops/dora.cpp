#include "ops/dora.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(
      m,
      "dora(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor magnitude, float scaling, "
      "float dropout_p=0., Tensor? rng_state=None) -> (Tensor out, Tensor norm)");
  define_op(m,
            "dora_backward(Tensor grad, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, "
            "Tensor norm, float scaling, float dropout_p, Tensor? rng_state, bool[4] output_mask) "
            "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_magnitude)");
}

}  // namespace safe_kernels
