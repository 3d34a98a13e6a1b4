// Whether a tensor has values that can be read now, without waiting for a device.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace safe_kernels {

inline bool is_readable(const at::Tensor& tensor) {
  const auto keys = tensor.key_set();
  return tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.is_contiguous() && tensor.has_storage() &&
         at::isFloatingType(tensor.scalar_type()) && !keys.has(c10::DispatchKey::Python) &&
         !keys.has_any(c10::functorch_transforms_ks) && !keys.has(c10::DispatchKey::Functionalize) &&
         (tensor.numel() == 0 || tensor.const_data_ptr() != nullptr);
}

// A number that changes with the values.
inline std::optional<int64_t> fingerprint(const at::Tensor& tensor) {
  if (!tensor.defined()) return 0;
  if (!is_readable(tensor)) return std::nullopt;
  const std::string_view bytes(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
  return static_cast<int64_t>(std::hash<std::string_view>{}(bytes));
}

}  // namespace safe_kernels
