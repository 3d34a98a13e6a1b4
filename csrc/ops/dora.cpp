#include "ops/dora.h"

#include "checks.h"
#include "dispatch.h"
#include "ops/lora_linear.h"

namespace safe_kernels {

void check_dora(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                const Tensor& lora_B, const Tensor& magnitude, double /*scaling*/, double dropout_p,
                const std::optional<Tensor>& rng_state) {
  check_weight(weight, lora_A, lora_B);
  check_features(x, "x", weight, "weight", 1);
  check_device(x, "x", weight, "weight");
  if (given(bias)) check_per_output(*bias, "bias", weight, "weight");
  check_per_output(magnitude, "magnitude", weight, "weight");
  check_dropout(dropout_p, rng_state, x, "x");
}

void check_dora_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& magnitude, const Tensor& norm, double /*scaling*/,
                         double dropout_p, const std::optional<Tensor>& rng_state,
                         const std::array<bool, 4>& output_mask) {
  check_weight(weight, lora_A, lora_B);
  check_features(grad, "grad", weight, "weight", 0);
  check_per_output(magnitude, "magnitude", weight, "weight");
  check_per_output(norm, "norm", weight, "weight");
  check_dropout(dropout_p, rng_state, grad, "grad");
  if (given(x)) {
    check_features(*x, "x", weight, "weight", 1);
    check_leading(grad, "grad", *x);
  } else {
    TORCH_CHECK_VALUE(!output_mask[1] && !output_mask[2] && !output_mask[3],
                      "x is needed for the gradients of lora_A, lora_B and magnitude, got None");
  }
}

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
