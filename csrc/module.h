// What the parts of this folder add to the Python module, in addition to their ops.

#pragma once

#include <pybind11/pybind11.h>

namespace safe_kernels {

// `invertible`, `marks` and `fingerprint`: see safe_kernels/inversion.py.
void bind_inversion(pybind11::module_& m);

// `LaunchRecord`, `register_replayed`, `forget_records` and `record_counts`.
void bind_launch_replay(pybind11::module_& m);

}  // namespace safe_kernels
