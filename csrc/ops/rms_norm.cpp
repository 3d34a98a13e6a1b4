#include "ops/rms_norm.h"

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

void check_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_has_features(x, "x");
  check_per_feature(weight, "weight", x, "x");
  check_eps(eps);
}

void check_rms_norm_backward(const Tensor& grad, const Tensor& retained, const Tensor& weight, const Tensor& rstd,
                             double /*weight_offset*/, bool /*from_output*/,
                             const std::array<bool, 2>& /*output_mask*/) {
  check_has_features(retained, "retained");
  check_same_shape(grad, "grad", retained, "retained");
  check_per_feature(weight, "weight", retained, "retained");
  check_per_row(rstd, "rstd", retained, "retained");
}

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0., bool retain_output=True) "
            "-> (Tensor out, Tensor rstd)");
  define_op(m,
            "rms_norm_backward(Tensor grad, Tensor retained, Tensor weight, Tensor rstd, float weight_offset, "
            "bool from_output, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_weight)");
}

}  // namespace safe_kernels
