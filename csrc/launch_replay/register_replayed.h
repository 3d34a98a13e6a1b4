// An op with a host function in Python, which runs once per kind of call; after that its launch record is replayed.

#pragma once

#include <pybind11/pybind11.h>

namespace safe_kernels::launch_replay {

// Adds `register_replayed`, `forget_records`, `record_counts` and `LaunchRecord` to the module.
void bind(pybind11::module_& m);

}  // namespace safe_kernels::launch_replay
