#pragma once

#include <ATen/core/Tensor.h>

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formula and shapes are in safe_kernels/reference/.
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed);

// Every kernel calls it, so that errors are the same on every backend.
void check_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin);

}  // namespace safe_kernels
