// The part of CUDA's driver that launches need, looked up in the library that the process has loaded: the extension is
// built without CUDA, and also runs without it.

#pragma once

#include <array>
#include <cstdint>

namespace safe_kernels::launch_replay {

struct Grid {
  std::array<unsigned, 3> programs;
  unsigned threads;  // per program
  unsigned shared;   // bytes per program
};

// Whether this thread can launch: the driver is loaded, and a context is current. Triton's launcher ensures both.
bool can_launch();

// Starts a kernel; `function` and `stream` are driver handles, `parameters` the addresses of its arguments.
void launch(void* function, const Grid& grid, void* stream, void** parameters);

}  // namespace safe_kernels::launch_replay
