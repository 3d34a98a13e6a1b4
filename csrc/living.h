// Objects that live in this process, for code that has to find what it is not given.

#pragma once

#include <pybind11/pybind11.h>

namespace safe_kernels {

// Adds `living` to the module.
void bind_living(pybind11::module_& m);

}  // namespace safe_kernels
