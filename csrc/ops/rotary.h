#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formula and shapes are in safe_kernels/reference/.
inline Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  return call_op<rotary>("safe_kernels::rotary", x, cos, sin, transposed);
}

// Every kernel calls it, so that errors are the same on every backend.
inline void check_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool /*transposed*/) {
  check_floating(x, "x");
  check_floating(cos, "cos");
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have four dimensions (batch, heads, tokens, d), got ", x.sym_sizes());
  TORCH_CHECK_VALUE(cos.dim() == 3 && (cos.sym_size(0) == 1 || cos.sym_size(0) == x.sym_size(0)) &&
                        cos.sym_size(1) == x.sym_size(1) && cos.sym_size(2) <= x.sym_size(3),
                    "cos must have shape [1 or batch, tokens, at most d], here [1 or ", x.sym_size(0), ", ",
                    x.sym_size(1), ", at most ", x.sym_size(3), "], got ", cos.sym_sizes());
  TORCH_CHECK_VALUE(cos.sym_size(2) % 2 == 0, "cos must have an even last dimension, got ", cos.sym_sizes());
  check_alike(sin, "sin", cos, "cos");
  check_device(cos, "cos", x, "x");
}

}  // namespace safe_kernels
