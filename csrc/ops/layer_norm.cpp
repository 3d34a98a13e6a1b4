#include "ops/layer_norm.h"

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

void check_layer_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                      double eps) {
  check_has_features(x, "x");
  if (given(weight)) check_per_feature(*weight, "weight", x, "x");
  if (given(bias)) check_per_feature(*bias, "bias", x, "x");
  check_eps(eps);
}

void check_layer_norm_backward(const Tensor& grad, const Tensor& retained, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& mean, const Tensor& rstd,
                               bool from_output, const std::array<bool, 3>& output_mask) {
  check_has_features(retained, "retained");
  check_same_shape(grad, "grad", retained, "retained");
  if (given(weight)) check_per_feature(*weight, "weight", retained, "retained");
  if (given(bias)) check_per_feature(*bias, "bias", retained, "retained");
  check_per_row(rstd, "rstd", retained, "retained");
  TORCH_CHECK_VALUE(from_output || given(mean),
                    "mean is needed when `retained` is the input (from_output=False), got None");
  if (given(mean)) check_per_row(*mean, "mean", retained, "retained");
  TORCH_CHECK_VALUE(!output_mask[1] || given(weight), "the gradient of weight is wanted, but weight is None");
  TORCH_CHECK_VALUE(!output_mask[2] || given(bias), "the gradient of bias is wanted, but bias is None");
}

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
