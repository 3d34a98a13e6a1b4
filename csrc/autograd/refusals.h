// Derivatives that the ops do not have, and what they say about it.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace safe_kernels {

[[noreturn]] inline void refuse_double_backward(const char* op) {
  TORCH_CHECK(false, "safe_kernels::", op,
              " cannot be differentiated twice: its backward is a fused kernel. "
              "For second derivatives use the layer without the binding (Binding.detach()).");
}

inline void refuse_forward_mode(const at::Tensor& tensor, const char* name, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), name,
                              " has a forward-mode tangent, but safe_kernels::", op,
                              " has no forward-mode derivative; use reverse mode");
}

}  // namespace safe_kernels
