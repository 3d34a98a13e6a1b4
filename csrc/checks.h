// Checks that the ops share. They throw, naming the argument, saying what came and what would do.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace safe_kernels {

inline bool given(const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

inline void check_floating(const at::Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   " must be float64, float32, bfloat16 or float16, got ", dtype);
}

inline void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& expected, const char* like) {
  TORCH_CHECK_VALUE(tensor.device() == expected.device(), name, " is on ", tensor.device(), " but ", like, " is on ",
                    expected.device(), "; move them to one device");
}

// What a norm multiplies or adds: one number a feature of x.
inline void check_per_feature(const at::Tensor& tensor, const char* name, const at::Tensor& x, const char* like) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == x.sym_size(-1), name, " must have shape [",
                    x.sym_size(-1), "], the last dimension of ", like, " ", x.sym_sizes(), ", got ",
                    tensor.sym_sizes());
  check_device(tensor, name, x, like);
}

// A statistic of a norm: one number a row of x.
inline void check_per_row(const at::Tensor& tensor, const char* name, const at::Tensor& x, const char* like) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == x.sym_sizes().slice(0, x.dim() - 1), name, " must have shape ",
                    x.sym_sizes().slice(0, x.dim() - 1), ", one number a row of ", like, ", got ", tensor.sym_sizes());
  check_device(tensor, name, x, like);
}

inline void check_has_features(const at::Tensor& x, const char* name) {
  check_floating(x, name);
  TORCH_CHECK_VALUE(x.dim() >= 1, name, " must have at least one dimension, got a scalar");
}

inline void check_same_shape(const at::Tensor& tensor, const char* name, const at::Tensor& expected, const char* like) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == expected.sym_sizes(), name, " must have the shape of ", like, ", ",
                    expected.sym_sizes(), ", got ", tensor.sym_sizes());
  check_device(tensor, name, expected, like);
}

inline void check_eps(double eps) { TORCH_CHECK_VALUE(eps >= 0.0, "eps must be at least 0, got ", eps); }

}  // namespace safe_kernels
