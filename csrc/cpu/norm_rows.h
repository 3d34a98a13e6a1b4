// The rows of RMSNorm and LayerNorm, forward and backward: one read and one write of each tensor a pass. The formulas
// stand in safe_kernels/reference/rms_norm.py and layer_norm.py.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>

#include "checks.h"
#include "cpu/reduce.h"
#include "cpu/rows.h"

namespace safe_kernels::cpu {

template <typename T>
struct Rms {
  using Real = T;
  static constexpr bool kCentred = false;  // no mean, no bias
};

template <typename T>
struct Layer {
  using Real = T;
  static constexpr bool kCentred = true;
};

template <typename T>
std::unique_ptr<T[]> row_scratch(int64_t columns) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(columns)]);  // not initialised
}

template <typename Norm>
struct NormForward {
  using T = typename Norm::Real;
  Rows x, out;
  const T* scale;  // [columns], weight + offset
  const T* bias;   // [columns]; null for RMSNorm
  T eps;
  T* mean;  // [rows]; null for RMSNorm
  T* rstd;  // [rows]
};

// target = a (x - mean) scale + bias
template <typename Norm, typename T>
SAFE_KERNELS_INLINE void normalise(const T* __restrict__ x, T mean, T rstd, const T* __restrict__ scale,
                                   const T* __restrict__ bias, int64_t columns, T* __restrict__ target) {
  if constexpr (Norm::kCentred) {
    for (int64_t j = 0; j < columns; ++j) target[j] = (x[j] - mean) * rstd * scale[j] + bias[j];
  } else {
    for (int64_t j = 0; j < columns; ++j) target[j] = x[j] * rstd * scale[j];
  }
}

template <typename T>
SAFE_KERNELS_INLINE void subtract(const T* __restrict__ x, T mean, int64_t columns, T* __restrict__ target) {
  for (int64_t j = 0; j < columns; ++j) target[j] = x[j] - mean;
}

template <typename Norm>
SAFE_KERNELS_INLINE void forward_body(const NormForward<Norm>& args, int64_t begin, int64_t end) {
  using T = typename Norm::Real;
  const int64_t columns = args.x.columns;
  const bool direct = args.out.dtype == c10::CppTypeToScalarType<T>::value;
  const auto copy = row_scratch<T>(columns), centred = row_scratch<T>(Norm::kCentred ? columns : 0);
  const auto result = row_scratch<T>(direct ? 0 : columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = read_block(args.x, row, row + 1, copy.get()).data;
    T mean = T(0), square;
    if constexpr (Norm::kCentred) {
      mean = sum(x, columns) / static_cast<T>(columns);
      subtract(x, mean, columns, centred.get());
      square = dot<T>(centred.get(), centred.get(), columns);
      args.mean[row] = mean;
    } else {
      square = dot(x, x, columns);
    }
    const T rstd = T(1) / std::sqrt(square / static_cast<T>(columns) + args.eps);
    args.rstd[row] = rstd;
    T* out = direct ? static_cast<T*>(args.out.data) + row * columns : result.get();
    normalise<Norm>(x, mean, rstd, args.scale, args.bias, columns, out);
    if (!direct) write_row(args.out, row, out);
  }
}

template <typename Norm>
struct NormBackward {
  using T = typename Norm::Real;
  Rows grad, retained, grad_x;  // grad_x without data: not wanted
  const T* scale;               // [columns]
  const T* inverse;             // [columns], 1 / scale when `retained` is the output, else null
  const T* bias;                // [columns]; null for RMSNorm
  const T* mean;                // [rows]; null for RMSNorm and when `retained` is the output
  const T* rstd;                // [rows]
  // Partial sums [chunks, columns] over chunks of rows. Chunks do not depend on the number of threads, and their sums
  // are added in order, so the gradients are the same to the last bit on any number of threads. Null: not wanted.
  T* grad_weight;
  T* grad_bias;
  int64_t chunk_rows;
};

// target = the normalised row, from the output or from the input.
template <typename Norm, typename T>
SAFE_KERNELS_INLINE void normalised_row(const NormBackward<Norm>& args, int64_t row, const T* __restrict__ retained,
                                        T* __restrict__ target) {
  const int64_t columns = args.retained.columns;
  const T* __restrict__ inverse = args.inverse;
  const T* __restrict__ bias = args.bias;
  if (inverse == nullptr) {
    const T rstd = args.rstd[row], mean = Norm::kCentred ? args.mean[row] : T(0);
    for (int64_t j = 0; j < columns; ++j) target[j] = (retained[j] - mean) * rstd;
  } else if constexpr (Norm::kCentred) {
    for (int64_t j = 0; j < columns; ++j) target[j] = (retained[j] - bias[j]) * inverse[j];
  } else {
    for (int64_t j = 0; j < columns; ++j) target[j] = retained[j] * inverse[j];
  }
}

// target (+)= values * factors, or values alone; `first` overwrites.
template <typename T>
SAFE_KERNELS_INLINE void accumulate(const T* __restrict__ values, const T* __restrict__ factors, bool first,
                                    int64_t columns, T* __restrict__ target) {
  for (int64_t j = 0; j < columns; ++j) {
    const T term = factors == nullptr ? values[j] : values[j] * factors[j];
    target[j] = first ? term : target[j] + term;
  }
}

// target = rstd (g - mean(g) [LayerNorm only] - x_hat mean(g x_hat)), g = grad * scale
template <typename Norm, typename T>
SAFE_KERNELS_INLINE void grad_x_row(const T* __restrict__ g, const T* __restrict__ x_hat, T rstd, int64_t columns,
                                    T* __restrict__ target) {
  const T share = T(1) / static_cast<T>(columns);
  const T along = dot(g, x_hat, columns) * share;
  const T level = Norm::kCentred ? sum(g, columns) * share : T(0);
  for (int64_t j = 0; j < columns; ++j) target[j] = rstd * (g[j] - level - x_hat[j] * along);
}

template <typename T>
SAFE_KERNELS_INLINE void times(const T* __restrict__ left, const T* __restrict__ right, int64_t columns,
                               T* __restrict__ target) {
  for (int64_t j = 0; j < columns; ++j) target[j] = left[j] * right[j];
}

template <typename Norm>
SAFE_KERNELS_INLINE void backward_chunk(const NormBackward<Norm>& args, int64_t chunk) {
  using T = typename Norm::Real;
  const int64_t columns = args.grad.columns;
  const int64_t begin = chunk * args.chunk_rows, end = std::min(begin + args.chunk_rows, args.grad.count);
  const bool direct = args.grad_x.dtype == c10::CppTypeToScalarType<T>::value;
  const auto grad_copy = row_scratch<T>(columns), retained_copy = row_scratch<T>(columns);
  const auto x_hat = row_scratch<T>(columns), scaled = row_scratch<T>(columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = read_block(args.grad, row, row + 1, grad_copy.get()).data;
    const T* retained = read_block(args.retained, row, row + 1, retained_copy.get()).data;
    normalised_row(args, row, retained, x_hat.get());
    if (args.grad_weight != nullptr)
      accumulate<T>(grad, x_hat.get(), row == begin, columns, args.grad_weight + chunk * columns);
    if (args.grad_bias != nullptr)
      accumulate<T>(grad, nullptr, row == begin, columns, args.grad_bias + chunk * columns);
    if (args.grad_x.data == nullptr) continue;
    times(grad, args.scale, columns, scaled.get());
    T* target = direct ? static_cast<T*>(args.grad_x.data) + row * columns : retained_copy.get();
    grad_x_row<Norm, T>(scaled.get(), x_hat.get(), args.rstd[row], columns, target);
    if (!direct) write_row(args.grad_x, row, target);
  }
}

template <typename Norm>
SAFE_KERNELS_INLINE void backward_body(const NormBackward<Norm>& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk(args, chunk);
}

// ---------------------------------------------------------------- what surrounds the rows

inline at::ScalarType compute_dtype(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                    const std::optional<at::Tensor>& bias) {
  const auto is_double = [](const at::Tensor& tensor) { return tensor.scalar_type() == at::kDouble; };
  const bool any = is_double(x) || (given(weight) && is_double(*weight)) || (given(bias) && is_double(*bias));
  return any ? at::kDouble : at::kFloat;
}

// A vector [columns] in the dtype of sums; `otherwise` everywhere when the tensor is not given.
inline at::Tensor per_feature(const std::optional<at::Tensor>& tensor, double otherwise, const at::Tensor& x,
                              at::ScalarType dtype) {
  if (given(tensor)) return tensor->to(dtype).contiguous();
  return at::full({x.size(-1)}, otherwise, x.options().dtype(dtype));
}

inline at::Tensor empty_like_x(const at::Tensor& x, bool wanted) {
  if (!wanted) return at::empty({0}, x.options());
  return at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
}

inline at::Tensor empty_per_row(const at::Tensor& x, at::ScalarType dtype) {
  return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(dtype));
}

// Chunks of rows of a backward pass: few enough that their sums are soon added, enough for every thread.
struct Chunks {
  int64_t rows, count;

  explicit Chunks(int64_t total_rows) {
    rows = std::max<int64_t>(32, (total_rows + 63) / 64);
    count = (total_rows + rows - 1) / rows;
  }
};

// The sum of the chunks, in the dtype of what it is the gradient of; shape [0] when it was not wanted.
inline at::Tensor sum_of_chunks(const at::Tensor& partial, bool wanted, const at::TensorOptions& like) {
  if (!wanted) return at::empty({0}, like);
  return partial.sum(0).to(like.dtype().toScalarType());
}

}  // namespace safe_kernels::cpu
