// What one kind of call allocates and launches, as its host function in Python did it: with the same shapes, strides,
// dtypes, alignments and numbers everything but the addresses is the same, and Python need not be asked again.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cuda/driver.h"

namespace safe_kernels::cuda {

using at::Tensor;

struct Plan {
  struct Allocation {
    std::vector<int64_t> sizes;
    at::ScalarType dtype;
    size_t first;  // launch before which it is made
    size_t last;   // launch after which it goes; of a result, and of what is never used, one that never comes
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

  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<int64_t> results;  // among the allocations
};

// Carries a plan out on the current stream of the tensors' device.
std::vector<Tensor> replay(const Plan& plan, std::vector<Tensor> tensors);

}  // namespace safe_kernels::cuda
