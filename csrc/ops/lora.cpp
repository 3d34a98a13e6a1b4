#include "ops/lora.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "lora(Tensor x, Tensor base, Tensor lora_A, Tensor lora_B, float scaling, "
            "float dropout_p=0., Tensor? rng_state=None, Tensor? block_starts=None, int block_rows=0, "
            "Tensor? row_weight=None) -> (Tensor out, Tensor statistics)");
  define_op(m,
            "lora_backward(Tensor grad, Tensor? x, Tensor lora_A, Tensor lora_B, float scaling, "
            "float dropout_p, Tensor? rng_state, bool[3] output_mask) "
            "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
}

}  // namespace safe_kernels
