// The rows of both norms, forward and backward: each pass reads or writes a tensor once.

#include "cpu/norms.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace safe_kernels::cpu {

namespace {

template <typename T>
struct NormForwardArgs {
  Rows x, out;
  bool centred;    // LayerNorm; RMSNorm has no mean and no bias
  const T* scale;  // [columns], weight + offset
  const T* bias;   // [columns] or null
  T eps;
  T* mean;  // [rows] or null
  T* rstd;  // [rows]
};

// The second sum corrects the rounding of the first. This matters for nearly constant rows, such as padding: there
// 1 / rstd is small, and PyTorch's mean of a constant row is exact.
template <typename T>
SAFE_KERNELS_INLINE T mean_of(const T* x, int64_t columns) {
  const T count = static_cast<T>(columns), mean = sum_of_distances<false>(x, T(0), columns) / count;
  return mean + sum_of_distances<false>(x, mean, columns) / count;
}

// target = (x - mean) rstd scale + bias
template <bool kCentred, typename T>
SAFE_KERNELS_INLINE void normalise(const T* __restrict__ x, T mean, T rstd, const T* __restrict__ scale,
                                   const T* __restrict__ bias, int64_t columns, T* __restrict__ target) {
  if constexpr (kCentred) {
    for (int64_t j = 0; j < columns; ++j) target[j] = (x[j] - mean) * rstd * scale[j] + bias[j];
  } else {
    for (int64_t j = 0; j < columns; ++j) target[j] = x[j] * rstd * scale[j];
  }
}

template <bool kCentred, typename T>
SAFE_KERNELS_INLINE void norm_forward_rows(const NormForwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t columns = args.x.columns;
  const bool direct = args.out.dtype == c10::CppTypeToScalarType<T>::value;
  const auto copy = scratch<T>(columns), result = scratch<T>(direct ? 0 : columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = read_block(args.x, row, row + 1, copy.get()).data;
    const T mean = kCentred ? mean_of(x, columns) : T(0);
    const T square = sum_of_distances<true>(x, mean, columns) / static_cast<T>(columns);
    const T rstd = T(1) / std::sqrt(square + args.eps);
    if constexpr (kCentred) args.mean[row] = mean;
    args.rstd[row] = rstd;
    T* out = direct ? static_cast<T*>(args.out.data) + row * columns : result.get();
    normalise<kCentred>(x, mean, rstd, args.scale, args.bias, columns, out);
    if (!direct) write_row(args.out, row, out);
  }
}

template <typename T>
SAFE_KERNELS_INLINE void norm_forward_body(const NormForwardArgs<T>& args, int64_t begin, int64_t end) {
  if (args.centred) return norm_forward_rows<true>(args, begin, end);
  norm_forward_rows<false>(args, begin, end);
}

template <typename T>
struct NormBackwardArgs {
  Rows grad, retained, grad_x;  // grad_x without data: not wanted
  bool centred, from_output;
  const T* scale;    // [columns]
  const T* inverse;  // [columns], 1 / scale if `retained` is the output, otherwise null
  const T* bias;     // [columns]; null for RMSNorm
  const T* mean;     // [rows]; null for RMSNorm, and if `retained` is the output
  const T* rstd;     // [rows]
  // Partial sums [chunks, columns] over chunks of rows. Chunks do not depend on the number of threads, and their sums
  // are added in order, so the gradients are the same to the last bit on any number of threads. Null: not wanted.
  T* grad_weight;
  T* grad_bias;
  int64_t chunk_rows;
};

// One row in backward. Each pass recomputes x_hat and g = grad scale: the row is in the L1 cache, so this is cheaper
// than storing them. A `Step` is a vector or one element.
template <typename T, bool kCentred, bool kFromOutput>
struct BackwardRow {
  const NormBackwardArgs<T>& args;
  const T* grad;
  const T* retained;
  T mean, rstd;
  int64_t columns;

  // result = out - bias, or (x - mean) rstd, which already is x_hat.
  template <typename Step>
  SAFE_KERNELS_INLINE void make_centred(int64_t j, typename Step::Vector& result) const {
    result = load<Step>(retained + j);
    if constexpr (kFromOutput) {
      if constexpr (kCentred) result -= load<Step>(args.bias + j);
    } else {
      if constexpr (kCentred) result -= mean;
      result *= rstd;
    }
  }

  template <typename Step>
  SAFE_KERNELS_INLINE void make_x_hat(int64_t j, typename Step::Vector& x_hat) const {
    make_centred<Step>(j, x_hat);
    if constexpr (kFromOutput) x_hat *= load<Step>(args.inverse + j);
  }

  // Adds g x_hat and g. From the output, g x_hat = grad scale (out - bias) / scale needs neither scale nor its inverse.
  template <typename Step>
  SAFE_KERNELS_INLINE void add_products(int64_t j, typename Step::Vector& along, typename Step::Vector& level) const {
    typename Step::Vector centred;
    make_centred<Step>(j, centred);
    const typename Step::Vector dy = load<Step>(grad + j), g = dy * load<Step>(args.scale + j);
    along += (kFromOutput ? dy : g) * centred;
    if constexpr (kCentred) level += g;
  }

  // target = rstd (g - mean(g) [LayerNorm only] - x_hat mean(g x_hat)).
  template <typename Step>
  SAFE_KERNELS_INLINE void store_grad_x(int64_t j, T mean_along, T mean_level, T* target) const {
    typename Step::Vector x_hat;
    make_x_hat<Step>(j, x_hat);
    typename Step::Vector g = load<Step>(grad + j) * load<Step>(args.scale + j);
    if constexpr (kCentred) g -= mean_level;
    store<Step>(target + j, rstd * (g - x_hat * mean_along));
  }

  // weights (+)= grad x_hat, biases (+)= grad; the first row of a chunk overwrites. Null: not wanted.
  template <typename Step>
  SAFE_KERNELS_INLINE void add_parameters(int64_t j, bool first, T* weights, T* biases) const {
    const typename Step::Vector dy = load<Step>(grad + j);
    typename Step::Vector x_hat;
    make_x_hat<Step>(j, x_hat);
    x_hat *= dy;
    if (weights != nullptr) store<Step>(weights + j, first ? x_hat : x_hat + load<Step>(weights + j));
    if (biases != nullptr) store<Step>(biases + j, first ? dy : dy + load<Step>(biases + j));
  }

  SAFE_KERNELS_INLINE void make_grad_x(T* target) const {
    constexpr int64_t kLanes = Wide<T>::kLanes;
    typename Wide<T>::Vector along[2] = {}, level[2] = {};
    T along_rest = T(0), level_rest = T(0);
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
      add_products<Wide<T>>(j, along[0], level[0]);
      add_products<Wide<T>>(j + kLanes, along[1], level[1]);
    }
    for (; j + kLanes <= columns; j += kLanes) add_products<Wide<T>>(j, along[0], level[0]);
    for (; j < columns; ++j) add_products<Narrow<T>>(j, along_rest, level_rest);
    const T count = static_cast<T>(columns);
    const T mean_along = (total<T>(along) + along_rest) / count, mean_level = (total<T>(level) + level_rest) / count;
    const int64_t whole = columns / kLanes * kLanes;
    for (j = 0; j < whole; j += kLanes) store_grad_x<Wide<T>>(j, mean_along, mean_level, target);
    for (; j < columns; ++j) store_grad_x<Narrow<T>>(j, mean_along, mean_level, target);
  }

  SAFE_KERNELS_INLINE void add_to_chunk(int64_t chunk, bool first) const {
    T* weights = args.grad_weight != nullptr ? args.grad_weight + chunk * columns : nullptr;
    T* biases = args.grad_bias != nullptr ? args.grad_bias + chunk * columns : nullptr;
    if (weights == nullptr && biases == nullptr) return;
    constexpr int64_t kLanes = Wide<T>::kLanes;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) add_parameters<Wide<T>>(j, first, weights, biases);
    for (; j < columns; ++j) add_parameters<Narrow<T>>(j, first, weights, biases);
  }
};

template <bool kCentred, bool kFromOutput, typename T>
SAFE_KERNELS_INLINE void norm_backward_chunk(const NormBackwardArgs<T>& args, int64_t chunk) {
  const int64_t columns = args.grad.columns;
  const int64_t begin = chunk * args.chunk_rows, end = std::min(begin + args.chunk_rows, args.grad.count);
  const bool wants_x = args.grad_x.data != nullptr;
  const bool direct = wants_x && args.grad_x.dtype == c10::CppTypeToScalarType<T>::value;
  const auto grad_copy = scratch<T>(columns), retained_copy = scratch<T>(columns), result = scratch<T>(columns);
  for (int64_t i = begin; i < end; ++i) {
    const BackwardRow<T, kCentred, kFromOutput> row{args,
                                                    read_block(args.grad, i, i + 1, grad_copy.get()).data,
                                                    read_block(args.retained, i, i + 1, retained_copy.get()).data,
                                                    args.mean == nullptr ? T(0) : args.mean[i],
                                                    args.rstd[i],
                                                    columns};
    row.add_to_chunk(chunk, i == begin);
    if (!wants_x) continue;
    T* target = direct ? static_cast<T*>(args.grad_x.data) + i * columns : result.get();
    row.make_grad_x(target);
    if (!direct) write_row(args.grad_x, i, target);
  }
}

template <typename T>
SAFE_KERNELS_INLINE void norm_backward_body(const NormBackwardArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (args.centred && args.from_output) {
      norm_backward_chunk<true, true>(args, chunk);
    } else if (args.centred) {
      norm_backward_chunk<true, false>(args, chunk);
    } else if (args.from_output) {
      norm_backward_chunk<false, true>(args, chunk);
    } else {
      norm_backward_chunk<false, false>(args, chunk);
    }
  }
}

SAFE_KERNELS_REAL_VARIANTS(forward_rows, norm_forward_body, NormForwardArgs)
SAFE_KERNELS_REAL_VARIANTS(backward_chunks, norm_backward_body, NormBackwardArgs)

// A vector [columns] in the dtype of sums; filled with `otherwise` if the tensor is not given.
Tensor per_feature(const std::optional<Tensor>& tensor, double otherwise, const Tensor& x, at::ScalarType dtype) {
  if (given(tensor)) return tensor->to(dtype).contiguous();
  return at::full({x.size(-1)}, otherwise, x.options().dtype(dtype));
}

Tensor scale_of(const Affine& affine, const Tensor& x, at::ScalarType dtype) {
  const Tensor scale = per_feature(affine.weight, 1.0, x, dtype);
  return affine.weight_offset == 0.0 ? scale : scale.add(affine.weight_offset);
}

template <typename T>
const T* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const Affine& affine, double eps, bool centred) {
  const auto dtype = compute_dtype({x, affine.weight, affine.bias});
  const Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  const Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(dtype));
  const Tensor mean = centred ? at::empty_like(rstd) : Tensor(), scale = scale_of(affine, x, dtype);
  const Tensor shift = centred ? per_feature(affine.bias, 0.0, x, dtype) : Tensor();
  AT_DISPATCH_FLOATING_TYPES(dtype, "norm", [&] {
    const NormForwardArgs<scalar_t> args{Rows(x),
                                         Rows(out),
                                         centred,
                                         scale.const_data_ptr<scalar_t>(),
                                         data_or_null<scalar_t>(shift),
                                         static_cast<scalar_t>(eps),
                                         centred ? mean.mutable_data_ptr<scalar_t>() : nullptr,
                                         rstd.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, args.x.count, 32, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& retained, const Affine& affine,
                                                 const std::optional<Tensor>& mean, const Tensor& rstd, bool centred,
                                                 bool from_output, const std::array<bool, 3>& wanted) {
  const auto dtype = compute_dtype({retained, affine.weight, affine.bias});
  const Tensor scale = scale_of(affine, retained, dtype), inverse = from_output ? scale.reciprocal() : Tensor();
  const Tensor shift = centred ? per_feature(affine.bias, 0.0, retained, dtype) : Tensor();
  const Tensor row_mean = centred && !from_output ? mean->to(dtype).contiguous() : Tensor();
  const Tensor row_rstd = rstd.to(dtype).contiguous();
  const Tensor grad_x = at::empty(wanted[0] ? retained.sizes() : at::IntArrayRef({0}),
                                  retained.options().memory_format(at::MemoryFormat::Contiguous));
  const Rows grads(grad);
  // Enough chunks for every thread, but few, since their sums must be added.
  const int64_t chunk_rows = std::max<int64_t>(32, (grads.count + 63) / 64);
  const int64_t chunks = (grads.count + chunk_rows - 1) / chunk_rows;
  const auto partial = [&](bool is_wanted) {
    return is_wanted ? at::empty({chunks, scale.size(0)}, scale.options()) : Tensor();
  };
  const Tensor weights = partial(wanted[1]), biases = partial(wanted[2]);
  AT_DISPATCH_FLOATING_TYPES(dtype, "norm_backward", [&] {
    const NormBackwardArgs<scalar_t> args{grads,
                                          Rows(retained),
                                          wanted[0] ? Rows(grad_x) : Rows(),
                                          centred,
                                          from_output,
                                          scale.const_data_ptr<scalar_t>(),
                                          data_or_null<scalar_t>(inverse),
                                          data_or_null<scalar_t>(shift),
                                          data_or_null<scalar_t>(row_mean),
                                          row_rstd.const_data_ptr<scalar_t>(),
                                          wanted[1] ? weights.mutable_data_ptr<scalar_t>() : nullptr,
                                          wanted[2] ? biases.mutable_data_ptr<scalar_t>() : nullptr,
                                          chunk_rows};
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { backward_chunks(args, begin, end); });
  });
  const auto sum_of = [&](const Tensor& parts, const std::optional<Tensor>& parameter) {
    const Tensor& like = given(parameter) ? *parameter : retained;
    return parts.defined() ? parts.sum(0).to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {grad_x, sum_of(weights, affine.weight), sum_of(biases, affine.bias)};
}

}  // namespace safe_kernels::cpu
