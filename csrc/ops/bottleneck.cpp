#include "ops/bottleneck.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "bottleneck(Tensor x, Tensor residual, Tensor W_down, Tensor b_down, Tensor W_up, Tensor b_up, "
            "str activation, float scaling, float dropout_p=0., Tensor? rng_state=None, Tensor? block_starts=None, "
            "int block_rows=0, Tensor? row_weight=None) -> (Tensor out, Tensor z, Tensor statistics)");
  define_op(m,
            "bottleneck_backward(Tensor grad, Tensor? x, Tensor? z, Tensor W_down, Tensor b_down, Tensor W_up, "
            "str activation, float scaling, float dropout_p, Tensor? rng_state, bool[5] output_mask) "
            "-> (Tensor grad_x, Tensor grad_W_down, Tensor grad_b_down, Tensor grad_W_up, Tensor grad_b_up)");
}

}  // namespace safe_kernels
