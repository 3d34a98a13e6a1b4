// Objects that live in this process, for those who have to find what nobody hands them.

#pragma once

#include <pybind11/pybind11.h>

namespace safe_kernels {

// Adds `living` to the module.
void bind_living(pybind11::module_& m);

}  // namespace safe_kernels
