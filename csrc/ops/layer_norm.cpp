#include "ops/layer_norm.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool retain_output=True) "
            "-> (Tensor out, Tensor mean, Tensor rstd)");
  define_op(
      m,
      "layer_norm_backward(Tensor grad, Tensor retained, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, "
      "bool from_output, bool[3] output_mask) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}

}  // namespace safe_kernels
