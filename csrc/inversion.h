// Properties of a norm's parameters that need no wait for a device: see safe_kernels/inversion.py.

#pragma once

#include <pybind11/pybind11.h>

namespace safe_kernels {

// Adds `invertible` and `marks` to the module.
void bind_inversion(pybind11::module_& m);

}  // namespace safe_kernels
