#include "ops/rms_norm.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0., bool retain_output=True) "
            "-> (Tensor out, Tensor rstd)");
  define_op(m,
            "rms_norm_backward(Tensor grad, Tensor retained, Tensor weight, Tensor rstd, float weight_offset, "
            "bool from_output, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_weight)");
}

}  // namespace safe_kernels
