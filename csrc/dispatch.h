// The definition of an op, and its call through PyTorch's dispatcher.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <type_traits>

namespace safe_kernels {

inline void define_op(torch::Library& m, const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); }

// `declared` is the function that makes this call; it has the op's signature.
template <auto declared, class... Args>
auto call_overload(const char* name, const char* overload, const Args&... args) {
  using Signature = std::remove_pointer_t<decltype(declared)>;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
  return op.call(args...);
}

template <auto declared, class... Args>
auto call_op(const char* name, const Args&... args) {
  return call_overload<declared>(name, "", args...);
}

}  // namespace safe_kernels
