// A launch record: the allocations and launches of one kind of call, recorded from its host function in Python. Calls
// with the same shapes, strides, dtypes, alignments and numbers differ only in addresses, so C++ can replay them.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <variant>
#include <vector>

namespace safe_kernels::launch_replay {

using at::Tensor;

struct Grid {
  std::array<unsigned, 3> programs;
  unsigned threads;  // per program
  unsigned shared;   // bytes per program
};

struct LaunchRecord {
  struct Allocation {
    std::vector<int64_t> sizes;
    at::ScalarType dtype;
    size_t first;  // step before which it is made
    size_t last;   // step after which it is freed; for a result or an unused one, a step that never comes
  };

  // A kernel's argument: an address in one of the call's tensors, or a number.
  struct Argument {
    int64_t tensor;  // the call's inputs first, then allocations; -1: a number
    uint64_t value;  // bytes after the tensor's first element, or the number's bits
  };

  struct Launch {
    uint64_t function;
    Grid grid;
    std::vector<Argument> arguments;
  };

  struct View {
    int64_t tensor;
    std::vector<int64_t> sizes, strides;
    int64_t offset;  // elements after the tensor's first one
  };

  // out += left right, by PyTorch.
  struct Product {
    View out, left, right;
  };

  std::vector<Allocation> allocations;
  std::vector<std::variant<Launch, Product>> steps;
  std::vector<int64_t> results;  // indices of allocations
};

// Whether this thread can launch: the driver is loaded, and a context is current. Triton's launcher ensures both.
bool can_launch();

// Replays a record on the current stream of the tensors' device.
std::vector<Tensor> replay(const LaunchRecord& record, std::vector<Tensor> tensors);

}  // namespace safe_kernels::launch_replay
