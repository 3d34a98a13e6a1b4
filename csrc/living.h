// Tensors that live in this process, for those who have to know whose memory a tensor shares.

#pragma once

#include <pybind11/pybind11.h>

namespace safe_kernels {

// Adds `living_tensors` to the module.
void bind_living(pybind11::module_& m);

}  // namespace safe_kernels
