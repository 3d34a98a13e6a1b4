#include "ops/linear_cross_entropy.h"

#include <cmath>
#include <utility>

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

namespace {

void check_head(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == x.sym_size(-1) && weight.sym_size(0) >= 1,
                    "weight must have shape [classes, ", x.sym_size(-1), "], the last dimension of x ", x.sym_sizes(),
                    ", and at least one class, got ", weight.sym_sizes());
  if (given(bias)) check_per_output(*bias, "bias", weight, "weight");
  for (const auto& [tensor, name] : {std::pair(weight, "weight"), std::pair(given(bias) ? *bias : weight, "bias")}) {
    check_device(tensor, name, x, "x");
    TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x, ", x.scalar_type(),
                     ", got ", tensor.scalar_type());
  }
}

}  // namespace

void check_linear_cross_entropy(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const Tensor& target, int64_t /*ignore_index*/, double scaling, double softcap) {
  check_has_features(x, "x");
  check_head(x, weight, bias);
  check_dense(target, "target");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64, got ", target.scalar_type());
  TORCH_CHECK_VALUE(target.sym_sizes() == x.sym_sizes().slice(0, x.dim() - 1), "target must have shape ",
                    x.sym_sizes().slice(0, x.dim() - 1), ", one class per row of x, got ", target.sym_sizes());
  check_device(target, "target", x, "x");
  TORCH_CHECK_VALUE(std::isfinite(scaling), "scaling must be finite, got ", scaling);
  TORCH_CHECK_VALUE(softcap >= 0.0 && std::isfinite(softcap), "softcap must be at least 0 and finite, got ", softcap);
}

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100, "
            "float scaling=1., float softcap=0.) -> Tensor");
  define_op(m,
            "linear_cross_entropy_backward(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
            "float scaling, float softcap) -> (Tensor loss, Tensor grad_x)");
}

}  // namespace safe_kernels
