// Rows of a tensor of any floating dtype, converted from and to the dtype of the sums.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <initializer_list>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "cpu/half.h"
#include "cpu/isa.h"

namespace safe_kernels::cpu {

// The dtype of a call's sums.
inline at::ScalarType compute_dtype(std::initializer_list<std::optional<at::Tensor>> tensors) {
  for (const auto& tensor : tensors)
    if (given(tensor) && tensor->scalar_type() == at::kDouble) return at::kDouble;
  return at::kFloat;
}

// [..., d] as [N, d].
inline at::Tensor matrix_of(const at::Tensor& tensor) {
  return tensor.reshape({c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1)), tensor.size(-1)});
}

// The last dimension is contiguous; row i begins at data + i * stride elements.
struct Rows {
  at::Tensor owner;  // keeps a copy alive if the tensor's strides are unsuitable
  void* data = nullptr;
  at::ScalarType dtype = at::kFloat;
  int64_t count = 0, columns = 0, stride = 0;

  Rows() = default;
  explicit Rows(const at::Tensor& tensor) {
    columns = tensor.size(-1);
    count = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
    owner = matrix_of(tensor);
    if (columns > 1 && owner.stride(1) != 1) owner = owner.contiguous();
    data = owner.data_ptr();
    dtype = owner.scalar_type();
    stride = owner.stride(0);
  }
};

template <typename From, typename To>
SAFE_KERNELS_INLINE void convert(const void* from, int64_t count, void* to) {
  const From* source = static_cast<const From*>(from);
  To* target = static_cast<To*>(to);
  if constexpr (std::is_same_v<From, c10::Half> && std::is_same_v<To, float>) {
    return half_to_float(source, count, target);
  } else if constexpr (std::is_same_v<From, float> && std::is_same_v<To, c10::Half>) {
    return float_to_half(source, count, target);
  }
  for (int64_t i = 0; i < count; ++i) target[i] = static_cast<To>(source[i]);
}

// Elements [column, column + width) of a row.
template <typename T>
SAFE_KERNELS_INLINE void read_row(const Rows& rows, int64_t row, int64_t column, int64_t width, T* out) {
  const int64_t begin = row * rows.stride + column;
  switch (rows.dtype) {
    case at::kDouble:
      return convert<double, T>(static_cast<double*>(rows.data) + begin, width, out);
    case at::kFloat:
      return convert<float, T>(static_cast<float*>(rows.data) + begin, width, out);
    case at::kBFloat16:
      return convert<c10::BFloat16, T>(static_cast<c10::BFloat16*>(rows.data) + begin, width, out);
    default:
      return convert<c10::Half, T>(static_cast<c10::Half*>(rows.data) + begin, width, out);
  }
}

template <typename T>
SAFE_KERNELS_INLINE void write_row(const Rows& rows, int64_t row, const T* in) {
  const int64_t begin = row * rows.stride;
  switch (rows.dtype) {
    case at::kDouble:
      return convert<T, double>(in, rows.columns, static_cast<double*>(rows.data) + begin);
    case at::kFloat:
      return convert<T, float>(in, rows.columns, static_cast<float*>(rows.data) + begin);
    case at::kBFloat16:
      return convert<T, c10::BFloat16>(in, rows.columns, static_cast<c10::BFloat16*>(rows.data) + begin);
    default:
      return convert<T, c10::Half>(in, rows.columns, static_cast<c10::Half*>(rows.data) + begin);
  }
}

// A block of rows in dtype T: the tensor's own memory if it has that dtype, otherwise a converted copy in `scratch`.
template <typename T>
struct Block {
  const T* data;
  int64_t stride;
};

template <typename T>
SAFE_KERNELS_INLINE Block<T> read_block(const Rows& rows, int64_t begin, int64_t end, T* scratch) {
  if (rows.dtype == c10::CppTypeToScalarType<T>::value) {
    return {static_cast<const T*>(rows.data) + begin * rows.stride, rows.stride};
  }
  for (int64_t row = begin; row < end; ++row)
    read_row(rows, row, 0, rows.columns, scratch + (row - begin) * rows.columns);
  return {scratch, rows.columns};
}

}  // namespace safe_kernels::cpu
