// What one kind of call allocates and launches, as its host function in Python did it: with the same shapes, strides,
// dtypes, alignments and numbers everything but the addresses is the same, and Python need not be asked again.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <variant>
#include <vector>

#include "launch_replay/driver.h"

namespace safe_kernels::launch_replay {

using at::Tensor;

struct LaunchRecord {
  struct Allocation {
    std::vector<int64_t> sizes;
    at::ScalarType dtype;
    size_t first;  // step before which it is made
    size_t last;   // step after which it goes; of a result, and of what is never used, one that never comes
  };

  // A kernel's argument: an address in one of the call's tensors, or a number.
  struct Argument {
    int64_t tensor;  // the call's own first, then allocations; -1: a number
    uint64_t value;  // bytes behind the tensor's first element, or the number's bits
  };

  struct Launch {
    uint64_t function;
    Grid grid;
    std::vector<Argument> arguments;
  };

  struct View {
    int64_t tensor;
    std::vector<int64_t> sizes, strides;
    int64_t offset;  // elements behind the tensor's first one
  };

  // out += left right, by PyTorch.
  struct Product {
    View out, left, right;
  };

  std::vector<Allocation> allocations;
  std::vector<std::variant<Launch, Product>> steps;
  std::vector<int64_t> results;  // among the allocations
};

// Replays a record on the current stream of the tensors' device.
std::vector<Tensor> replay(const LaunchRecord& record, std::vector<Tensor> tensors);

}  // namespace safe_kernels::launch_replay
