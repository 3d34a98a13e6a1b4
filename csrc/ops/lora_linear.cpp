#include "ops/lora_linear.h"

#include "checks.h"
#include "dispatch.h"
#include "ops/lora.h"

namespace safe_kernels {

namespace {

// A linear layer does not promote dtypes.
void check_dtype(const Tensor& tensor, const char* name, const Tensor& weight) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == weight.scalar_type(), name, " and weight must have one dtype, got ",
                   tensor.scalar_type(), " and ", weight.scalar_type(), "; cast ", name);
}

}  // namespace

void check_weight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  check_adapter(lora_A, lora_B);
  check_device(lora_B, "lora_B", lora_A, "lora_A");
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have shape [d_out, d_in], got ", weight.sym_sizes());
  TORCH_CHECK_VALUE(weight.sym_size(1) == lora_A.sym_size(1) && weight.sym_size(0) == lora_B.sym_size(0),
                    "weight must have shape [", lora_B.sym_size(0), ", ", lora_A.sym_size(1),
                    "], d_out of lora_B by d_in of lora_A, got ", weight.sym_sizes());
  check_device(weight, "weight", lora_A, "lora_A");
}

void check_lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                       const Tensor& lora_B, double /*scaling*/, double dropout_p,
                       const std::optional<Tensor>& rng_state, const std::optional<Tensor>& block_starts,
                       int64_t block_rows, const std::optional<Tensor>& row_weight) {
  check_weight(weight, lora_A, lora_B);
  check_features(x, "x", weight, "weight", 1);
  check_dtype(x, "x", weight);
  if (given(bias)) {
    check_per_output(*bias, "bias", weight, "weight");
    check_dtype(*bias, "bias", weight);
  }
  check_dropout(dropout_p, rng_state, x, "x");
  if (given(block_starts)) check_blocks(x, *block_starts, block_rows, row_weight);
}

void check_lora_linear_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight,
                                const Tensor& lora_A, const Tensor& lora_B, double /*scaling*/, double dropout_p,
                                const std::optional<Tensor>& rng_state, const std::array<bool, 5>& output_mask) {
  check_weight(weight, lora_A, lora_B);
  check_features(grad, "grad", weight, "weight", 0);
  check_dropout(dropout_p, rng_state, grad, "grad");
  if (given(x)) {
    check_features(*x, "x", weight, "weight", 1);
    check_leading(grad, "grad", *x);
  } else {
    TORCH_CHECK_VALUE(!output_mask[1] && !output_mask[3] && !output_mask[4],
                      "x is needed for the gradients of weight, lora_A and lora_B, got None");
  }
}

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
