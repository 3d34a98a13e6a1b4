// Temporary memory of a sweep over rows.

#pragma once

#include <cstdint>
#include <memory>

namespace safe_kernels::cpu {

template <typename T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]);  // not initialised
}

}  // namespace safe_kernels::cpu
