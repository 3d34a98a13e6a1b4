// As much of CUDA's driver as launching takes, found in the process that has loaded it: the extension is built without
// CUDA, and runs where there is none.

#pragma once

#include <array>
#include <cstdint>

namespace safe_kernels::launch_replay {

struct Grid {
  std::array<unsigned, 3> programs;
  unsigned threads;  // of a program
  unsigned shared;   // bytes of a program
};

// Whether this thread can launch: the driver is there, and a context is current. Triton's own launcher sees to both.
bool can_launch();

// Starts a kernel; `function` and `stream` are the driver's handles, `parameters` addresses of the kernel's arguments.
void launch(void* function, const Grid& grid, void* stream, void** parameters);

}  // namespace safe_kernels::launch_replay
