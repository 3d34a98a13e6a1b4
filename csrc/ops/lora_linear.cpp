#include "ops/lora_linear.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
            "float dropout_p=0., Tensor? rng_state=None, Tensor? block_starts=None, int block_rows=0, "
            "Tensor? row_weight=None) -> (Tensor out, Tensor statistics)");
  define_op(m,
            "lora_linear_backward(Tensor grad, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
            "float dropout_p, Tensor? rng_state, bool[5] output_mask) "
            "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_A, Tensor grad_B)");
}

}  // namespace safe_kernels
