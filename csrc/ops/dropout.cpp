#include "ops/dropout.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace safe_kernels {

void check_dropout_op(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  check_has_features(x, "x");
  check_dropout(dropout_p, rng_state, x, "x");
}

Tensor dropout(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("safe_kernels::dropout", "").typed<decltype(dropout)>();
  return op.call(x, dropout_p, rng_state);
}

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  m.def("dropout(Tensor x, float dropout_p, Tensor rng_state) -> Tensor", {at::Tag::pt2_compliant_tag});
}

}  // namespace safe_kernels
