// The key of a launch record: all properties of a call's arguments except contents and addresses.

#pragma once

#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <vector>

#include "launch_replay/launch_record.h"

namespace safe_kernels::launch_replay {

struct Signature {
  std::string key;
  std::vector<Tensor> tensors;  // of the arguments, in their order
};

// Empty if an argument has a kind that no op here takes, or if no argument is a tensor.
std::optional<Signature> signature_of(c10::ArrayRef<c10::IValue> arguments);

}  // namespace safe_kernels::launch_replay
