// What a call's record depends on: everything about its arguments but their contents and addresses.

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

// Nothing if an argument is of a kind that no op here takes, or no tensor is given.
std::optional<Signature> signature_of(c10::ArrayRef<c10::IValue> arguments);

}  // namespace safe_kernels::launch_replay
