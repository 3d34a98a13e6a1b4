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
#include "cpu/rows.h"
#include "cpu/simd.h"

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

// The second sum corrects the rounding of the first. That rounding matters in rows that are nearly constant, such as
// those of padding: 1 / rstd is small there, and PyTorch's mean of a constant row is exact.
template <typename T>
SAFE_KERNELS_INLINE T mean_of(const T* x, int64_t columns) {
  const T count = static_cast<T>(columns), mean = sum(x, T(0), columns) / count;
  return mean + sum(x, mean, columns) / count;
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

// target = (x - mean) rstd scale + bias
template <typename Norm, typename T>
SAFE_KERNELS_INLINE void normalise(const T* __restrict__ x, T mean, T rstd, const T* __restrict__ scale,
                                   const T* __restrict__ bias, int64_t columns, T* __restrict__ target) {
  if constexpr (Norm::kCentred) {
    for (int64_t j = 0; j < columns; ++j) target[j] = (x[j] - mean) * rstd * scale[j] + bias[j];
  } else {
    for (int64_t j = 0; j < columns; ++j) target[j] = x[j] * rstd * scale[j];
  }
}

template <typename Norm>
SAFE_KERNELS_INLINE void forward_body(const NormForward<Norm>& args, int64_t begin, int64_t end) {
  using T = typename Norm::Real;
  const int64_t columns = args.x.columns;
  const bool direct = args.out.dtype == c10::CppTypeToScalarType<T>::value;
  const auto copy = row_scratch<T>(columns), result = row_scratch<T>(direct ? 0 : columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = read_block(args.x, row, row + 1, copy.get()).data;
    const T mean = Norm::kCentred ? mean_of(x, columns) : T(0);
    const T square = sum_of_squares(x, mean, columns) / static_cast<T>(columns);
    const T rstd = T(1) / std::sqrt(square + args.eps);
    if constexpr (Norm::kCentred) args.mean[row] = mean;
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

// One row on its way back. x_hat and g = grad scale are made again in each pass: the row is in the L1 cache, and
// storing them would cost more than they do.
template <typename Norm>
struct BackwardRow {
  using T = typename Norm::Real;
  const NormBackward<Norm>& args;
  const T* grad;
  const T* retained;
  T mean, rstd;
  int64_t columns;
};

// centred = out - bias, or (x - mean) rstd, which is x_hat already.
template <typename Norm, typename Step, bool kFromOutput>
SAFE_KERNELS_INLINE void make_centred(const BackwardRow<Norm>& row, int64_t j, typename Step::Vector& centred) {
  centred = load<Step>(row.retained + j);
  if constexpr (kFromOutput) {
    if constexpr (Norm::kCentred) centred -= load<Step>(row.args.bias + j);
  } else {
    if constexpr (Norm::kCentred) centred -= row.mean;
    centred *= row.rstd;
  }
}

template <typename Norm, typename Step, bool kFromOutput>
SAFE_KERNELS_INLINE void make_x_hat(const BackwardRow<Norm>& row, int64_t j, typename Step::Vector& x_hat) {
  make_centred<Norm, Step, kFromOutput>(row, j, x_hat);
  if constexpr (kFromOutput) x_hat *= load<Step>(row.args.inverse + j);
}

// From the output, g x_hat = grad scale (out - bias) / scale needs neither the scale nor its inverse.
template <typename Norm, typename Step, bool kFromOutput>
SAFE_KERNELS_INLINE void means_step(const BackwardRow<Norm>& row, int64_t j, typename Step::Vector& along,
                                    typename Step::Vector& level) {
  typename Step::Vector centred;
  make_centred<Norm, Step, kFromOutput>(row, j, centred);
  const typename Step::Vector grad = load<Step>(row.grad + j), g = grad * load<Step>(row.args.scale + j);
  along += (kFromOutput ? grad : g) * centred;
  if constexpr (Norm::kCentred) level += g;
}

template <typename T>
struct Means {
  T along, level;  // of g x_hat, and of g (LayerNorm only)
};

template <typename Norm, bool kFromOutput>
SAFE_KERNELS_INLINE Means<typename Norm::Real> means_of(const BackwardRow<Norm>& row) {
  using T = typename Norm::Real;
  constexpr int64_t kLanes = Wide<T>::kLanes;
  typename Wide<T>::Vector along[2] = {}, level[2] = {};
  T along_rest = T(0), level_rest = T(0);
  int64_t j = 0;
  for (; j + 2 * kLanes <= row.columns; j += 2 * kLanes) {
    means_step<Norm, Wide<T>, kFromOutput>(row, j, along[0], level[0]);
    means_step<Norm, Wide<T>, kFromOutput>(row, j + kLanes, along[1], level[1]);
  }
  for (; j + kLanes <= row.columns; j += kLanes) means_step<Norm, Wide<T>, kFromOutput>(row, j, along[0], level[0]);
  for (; j < row.columns; ++j) means_step<Norm, Narrow<T>, kFromOutput>(row, j, along_rest, level_rest);
  const T count = static_cast<T>(row.columns);
  return {(total<T>(along) + along_rest) / count, (total<T>(level) + level_rest) / count};
}

// target = rstd (g - mean(g) [LayerNorm only] - x_hat mean(g x_hat)).
template <typename Norm, typename Step, bool kFromOutput>
SAFE_KERNELS_INLINE void grad_x_step(const BackwardRow<Norm>& row, int64_t j, const Means<typename Norm::Real>& means,
                                     typename Norm::Real* target) {
  typename Step::Vector x_hat;
  make_x_hat<Norm, Step, kFromOutput>(row, j, x_hat);
  typename Step::Vector g = load<Step>(row.grad + j) * load<Step>(row.args.scale + j);
  if constexpr (Norm::kCentred) g -= means.level;
  store<Step>(target + j, row.rstd * (g - x_hat * means.along));
}

// grad_weight (+)= grad x_hat, grad_bias (+)= grad; the first row of a chunk overwrites. Null: not wanted.
template <typename Norm, typename Step, bool kFromOutput>
SAFE_KERNELS_INLINE void parameters_step(const BackwardRow<Norm>& row, int64_t j, bool first,
                                         typename Norm::Real* grad_weight, typename Norm::Real* grad_bias) {
  const typename Step::Vector grad = load<Step>(row.grad + j);
  typename Step::Vector x_hat;
  make_x_hat<Norm, Step, kFromOutput>(row, j, x_hat);
  x_hat *= grad;
  if (grad_weight != nullptr) store<Step>(grad_weight + j, first ? x_hat : x_hat + load<Step>(grad_weight + j));
  if (grad_bias != nullptr) store<Step>(grad_bias + j, first ? grad : grad + load<Step>(grad_bias + j));
}

template <typename Norm, bool kFromOutput>
SAFE_KERNELS_INLINE void backward_row(const BackwardRow<Norm>& row, bool first, int64_t chunk,
                                      typename Norm::Real* target) {
  using T = typename Norm::Real;
  constexpr int64_t kLanes = Wide<T>::kLanes;
  const int64_t columns = row.columns, whole = columns / kLanes * kLanes;
  if (row.args.grad_weight != nullptr || row.args.grad_bias != nullptr) {
    T* grad_weight = row.args.grad_weight != nullptr ? row.args.grad_weight + chunk * columns : nullptr;
    T* grad_bias = row.args.grad_bias != nullptr ? row.args.grad_bias + chunk * columns : nullptr;
    for (int64_t j = 0; j < whole; j += kLanes)
      parameters_step<Norm, Wide<T>, kFromOutput>(row, j, first, grad_weight, grad_bias);
    for (int64_t j = whole; j < columns; ++j)
      parameters_step<Norm, Narrow<T>, kFromOutput>(row, j, first, grad_weight, grad_bias);
  }
  if (target == nullptr) return;
  const Means<T> means = means_of<Norm, kFromOutput>(row);
  for (int64_t j = 0; j < whole; j += kLanes) grad_x_step<Norm, Wide<T>, kFromOutput>(row, j, means, target);
  for (int64_t j = whole; j < columns; ++j) grad_x_step<Norm, Narrow<T>, kFromOutput>(row, j, means, target);
}

template <typename Norm>
SAFE_KERNELS_INLINE void backward_chunk(const NormBackward<Norm>& args, int64_t chunk) {
  using T = typename Norm::Real;
  const int64_t columns = args.grad.columns;
  const int64_t begin = chunk * args.chunk_rows, end = std::min(begin + args.chunk_rows, args.grad.count);
  const bool wants_x = args.grad_x.data != nullptr;
  const bool direct = wants_x && args.grad_x.dtype == c10::CppTypeToScalarType<T>::value;
  const auto grad_copy = row_scratch<T>(columns), retained_copy = row_scratch<T>(columns);
  const auto result = row_scratch<T>(columns);
  for (int64_t i = begin; i < end; ++i) {
    const T* grad = read_block(args.grad, i, i + 1, grad_copy.get()).data;
    const T* retained = read_block(args.retained, i, i + 1, retained_copy.get()).data;
    const T mean = args.mean == nullptr ? T(0) : args.mean[i];
    const BackwardRow<Norm> row{args, grad, retained, mean, args.rstd[i], columns};
    T* target = direct ? static_cast<T*>(args.grad_x.data) + i * columns : wants_x ? result.get() : nullptr;
    if (args.inverse != nullptr) {
      backward_row<Norm, true>(row, i == begin, chunk, target);
    } else {
      backward_row<Norm, false>(row, i == begin, chunk, target);
    }
    if (wants_x && !direct) write_row(args.grad_x, i, target);
  }
}

template <typename Norm>
SAFE_KERNELS_INLINE void backward_body(const NormBackward<Norm>& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk(args, chunk);
}

// ---------------------------------------------------------------- what surrounds the rows

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
