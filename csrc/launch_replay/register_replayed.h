// An op whose host function is in Python: asked for each kind of call once, and after that its record is replayed.

#pragma once

#include <pybind11/pybind11.h>

namespace safe_kernels::launch_replay {

// Adds `register_replayed`, `forget_records`, `record_counts` and `LaunchRecord` to the module.
void bind(pybind11::module_& m);

}  // namespace safe_kernels::launch_replay
