// Checks that the ops share. The errors name the argument, the actual value and the expected value.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace safe_kernels {

inline bool given(const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

inline std::optional<at::Tensor> or_none(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// The kernels read strided memory; they cannot read other layouts.
inline void check_dense(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_TYPE(!tensor.is_nested(), name, " must be a dense tensor, got a nested one; pad it (to_padded_tensor)");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, " must be a dense tensor, got one of layout ",
                   tensor.layout(), "; call to_dense()");
}

inline void check_floating(const at::Tensor& tensor, const char* name) {
  check_dense(tensor, name);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   " must be float64, float32, bfloat16 or float16, got ", dtype);
}

inline void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& expected, const char* like) {
  TORCH_CHECK_VALUE(tensor.device() == expected.device(), name, " is on ", tensor.device(), " but ", like, " is on ",
                    expected.device(), "; move them to one device");
}

inline void check_has_features(const at::Tensor& x, const char* name) {
  check_floating(x, name);
  TORCH_CHECK_VALUE(x.dim() >= 1, name, " must have at least one dimension, got a scalar");
}

// Nothing is broadcast or promoted: a kernel reads both element by element.
inline void check_alike(const at::Tensor& tensor, const char* name, const at::Tensor& expected, const char* like) {
  check_dense(tensor, name);
  check_device(tensor, name, expected, like);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == expected.sym_sizes(), name, " must have the shape of ", like, ", ",
                    expected.sym_sizes(), ", got ", tensor.sym_sizes(), "; expand the smaller one");
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected.scalar_type(), name, " must have the dtype of ", like, ", ",
                   expected.scalar_type(), ", got ", tensor.scalar_type());
}

inline void check_dropout(double dropout_p, const std::optional<at::Tensor>& rng_state, const at::Tensor& like,
                          const char* like_name) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, "dropout_p must be in [0, 1], got ", dropout_p);
  if (dropout_p == 0.0) return;
  TORCH_CHECK_VALUE(given(rng_state), "rng_state must be an int64 tensor [2] when dropout_p > 0, got None");
  check_dense(*rng_state, "rng_state");
  TORCH_CHECK_TYPE(rng_state->scalar_type() == at::kLong, "rng_state must be int64, got ", rng_state->scalar_type());
  TORCH_CHECK_VALUE(rng_state->dim() == 1 && rng_state->sym_size(0) == 2, "rng_state must have shape [2], got ",
                    rng_state->sym_sizes());
  check_device(*rng_state, "rng_state", like, like_name);
}

// A norm's weight or bias: one number per feature of x.
inline void check_per_feature(const at::Tensor& tensor, const char* name, const at::Tensor& x, const char* like) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == x.sym_size(-1), name, " must have shape [",
                    x.sym_size(-1), "], the last dimension of ", like, " ", x.sym_sizes(), ", got ",
                    tensor.sym_sizes());
  check_device(tensor, name, x, like);
}

// A bias or the like: one number per row of a layer's weight.
inline void check_per_output(const at::Tensor& tensor, const char* name, const at::Tensor& weight,
                             const char* weight_name) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == weight.sym_size(0), name, " must have shape [",
                    weight.sym_size(0), "], one number per row of ", weight_name, ", got ", tensor.sym_sizes());
  check_device(tensor, name, weight, weight_name);
}

// A statistic of a norm: one number per row of x.
inline void check_per_row(const at::Tensor& tensor, const char* name, const at::Tensor& x, const char* like) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == x.sym_sizes().slice(0, x.dim() - 1), name, " must have shape ",
                    x.sym_sizes().slice(0, x.dim() - 1), ", one number per row of ", like, ", got ",
                    tensor.sym_sizes());
  check_device(tensor, name, x, like);
}

inline void check_same_shape(const at::Tensor& tensor, const char* name, const at::Tensor& expected, const char* like) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == expected.sym_sizes(), name, " must have the shape of ", like, ", ",
                    expected.sym_sizes(), ", got ", tensor.sym_sizes());
  check_device(tensor, name, expected, like);
}

inline void check_eps(double eps) { TORCH_CHECK_VALUE(eps >= 0.0, "eps must be at least 0, got ", eps); }

}  // namespace safe_kernels
