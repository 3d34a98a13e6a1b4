#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formula is in safe_kernels/reference/.
inline Tensor dropout(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  return call_op<dropout>("safe_kernels::dropout", x, dropout_p, rng_state);
}

// Every kernel calls it, so that errors are the same on every backend.
inline void check_dropout_op(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  check_has_features(x, "x");
  check_dropout(dropout_p, rng_state, x, "x");
}

}  // namespace safe_kernels
