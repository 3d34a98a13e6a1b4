// Bottleneck adapters on a CPU, like lora_sweeps.h: a block of rows is read once, while it is in the cache. In float32
// and float64, BLAS computes the products of backward.
// Each hidden row gets one more number, 1, and W_up one more row, scaling * b_up. So the product adds the bias, and the
// gradient of that row is the gradient of the bias.

#include "ops/bottleneck.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/activations.h"
#include "cpu/cka.h"
#include "cpu/dropout.h"
#include "cpu/lora_sweeps.h"

namespace safe_kernels::cpu {

namespace {

constexpr int64_t kOne = 8;  // numbers that a hidden row gets after its own, which are padded to whole vectors

// The layer down: z [rows, stride] = x W_down' + b_down.
template <typename T>
struct Down {
  Rows x;
  const T* weight;  // [d_in, stride]
  const T* bias;    // [stride]
  int64_t stride;
};

template <typename T>
SAFE_KERNELS_INLINE void down_block(const Down<T>& down, const Block<T>& x, int64_t rows, T* z) {
  const int64_t row = down.stride + kOne;
  gemm<T>({rows, down.stride, down.x.columns, x.data, x.stride, 1, down.weight, down.stride, down.bias, 0, z, row});
}

template <typename T>
struct BottleneckForwardArgs {
  Down<T> down;
  Rows residual, out, z;
  const T* up;  // [r + 1, d_out]
  int64_t r;
  T scaling;
  Kind kind;
  Dropout dropout;
  T* h;  // [N, stride + kOne], kept for the statistics, or null
};

struct BottleneckForward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const BottleneckForwardArgs<T>& args, int64_t begin, int64_t end) {
    const int64_t d_in = args.down.x.columns, d_out = args.out.columns, row_size = args.down.stride + kOne, r = args.r;
    const int64_t step = rows_in_block(std::max(d_in, d_out));
    const bool direct = args.out.dtype == c10::CppTypeToScalarType<T>::value;
    const Dropper<T> dropper(args.dropout, r);
    const auto x_copy = scratch<T>(step * d_in);
    const auto residual_copy = scratch<T>(step * d_out);
    const auto hidden = scratch<T>(step * row_size);
    for (int64_t row = begin; row < end; row += step) {
      const int64_t last = std::min(row + step, end), rows = last - row;
      T* h = args.h != nullptr ? args.h + row * row_size : hidden.get();
      down_block(args.down, read_block(args.down.x, row, last, x_copy.get()), rows, h);
      for (int64_t i = 0; i < rows; ++i) {
        T* values = h + i * row_size;
        write_row(args.z, row + i, values);
#pragma GCC ivdep
        for (int64_t j = 0; j < r; ++j) values[j] = Activation::value(values[j]) * args.scaling;
        dropper.in_place(row + i, values);
        values[r] = T(1);
      }
      const Block<T> residual = read_block(args.residual, row, last, residual_copy.get());
      T* out = direct ? static_cast<T*>(args.out.data) + row * d_out : residual_copy.get();
      gemm<T>({rows, d_out, r + 1, h, row_size, 1, args.up, d_out, residual.data, residual.stride, out, d_out});
      if (!direct)
        for (int64_t i = 0; i < rows; ++i) write_row(args.out, row + i, out + i * d_out);
    }
  }
};

template <typename T>
struct BottleneckBackwardArgs {
  Down<T> down;          // x without data: not needed
  Rows grad, z, grad_x;  // z without data: made from x; grad_x without data: not wanted
  const T* W_down;       // [r, d_in]
  const T* up;           // [d_out, stride + kOne]
  int64_t d_in, r;
  T scaling;
  Kind kind;
  Dropout dropout;
  // Partial sums over chunks of rows, as in LoraBackwardArgs. Null: not wanted.
  T* grad_down;    // [chunks, r, d_in]
  T* grad_b_down;  // [chunks, r]
  T* grad_up;      // [chunks, last_up - first_up, d_out]: rows of W_up', the last one of which is b_up
  int64_t first_up, last_up;
  bool wants_z;
  int64_t chunk_rows;
};

struct BottleneckBackward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const BottleneckBackwardArgs<T>& args, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) chunk_of_rows<Activation>(args, chunk);
  }

  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void chunk_of_rows(const BottleneckBackwardArgs<T>& args, int64_t chunk) {
    const int64_t d_in = args.d_in, d_out = args.grad.columns, row_size = args.down.stride + kOne, r = args.r;
    const int64_t begin = chunk * args.chunk_rows, end = std::min(begin + args.chunk_rows, args.grad.count);
    const int64_t step = rows_in_block(std::max(d_in, d_out));
    const bool drops = args.dropout.threshold > 0, reads_x = args.down.x.data != nullptr;
    const bool wants_slope = args.grad_x.data != nullptr || args.grad_b_down != nullptr || args.grad_down != nullptr;
    const auto x_copy = scratch<T>(step * d_in), grad_copy = scratch<T>(step * d_out);
    const auto h = scratch<T>(step * row_size), grad_z = scratch<T>(step * row_size);
    const auto factors = scratch<T>(drops ? step * r : 0);
    const auto bits = scratch<uint16_t>(drops ? r + kColumnsAtOnce : 0);
    if (args.grad_b_down != nullptr) std::fill_n(args.grad_b_down + chunk * r, r, T(0));
    for (int64_t row = begin; row < end; row += step) {
      const int64_t last = std::min(row + step, end), rows = last - row;
      const Block<T> grad = read_block(args.grad, row, last, grad_copy.get());
      Block<T> x{nullptr, 0};
      if (reads_x) x = read_block(args.down.x, row, last, x_copy.get());
      if (args.z.data != nullptr)
        for (int64_t i = 0; i < rows; ++i) read_row(args.z, row + i, 0, r, h.get() + i * row_size);
      else if (args.wants_z)
        down_block(args.down, x, rows, h.get());
      if (drops) block_factors(args.dropout, row, last, r, bits.get(), factors.get());
      if (wants_slope)
        gemm<T>({rows, r, d_out, grad.data, grad.stride, 1, args.up, row_size, nullptr, 0, grad_z.get(), row_size});
      for (int64_t i = 0; i < rows; ++i)
        activate<Activation>(args, wants_slope, drops ? factors.get() + i * r : nullptr, h.get() + i * row_size,
                             grad_z.get() + i * row_size);
      add_sums(args, chunk, row == begin, rows, grad, x, h.get(), grad_z.get());
      if (args.grad_x.data != nullptr) write_grad_x(args, row, rows, grad_z.get(), x_copy.get());
    }
  }

  // One row: h from z, and the gradient of z from that of h.
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void activate(const BottleneckBackwardArgs<T>& args, bool wants_slope, const T* factors,
                                           T* h, T* grad_z) {
    const int64_t r = args.r;
    const T scaling = args.scaling;
    if (wants_slope) {
      scale_by(grad_z, scaling, r);
      if (factors != nullptr) multiply(grad_z, factors, r);
#pragma GCC ivdep
      for (int64_t j = 0; j < r; ++j) {
        T value;
        grad_z[j] = Activation::pull_back(h[j], grad_z[j], value);
        h[j] = value * scaling;
      }
    } else if (args.wants_z) {
#pragma GCC ivdep
      for (int64_t j = 0; j < r; ++j) h[j] = Activation::value(h[j]) * scaling;
    }
    if (factors != nullptr && args.wants_z) multiply(h, factors, r);
    h[r] = T(1);
  }

  template <typename T>
  static SAFE_KERNELS_INLINE void add_sums(const BottleneckBackwardArgs<T>& args, int64_t chunk, bool first,
                                           int64_t rows, const Block<T>& grad, const Block<T>& x, const T* h,
                                           const T* grad_z) {
    const int64_t d_in = args.d_in, d_out = args.grad.columns, row_size = args.down.stride + kOne, r = args.r;
    if (args.grad_down != nullptr) {
      T* sum = args.grad_down + chunk * r * d_in;
      gemm<T>({r, d_in, rows, grad_z, 1, row_size, x.data, x.stride, first ? nullptr : sum, d_in, sum, d_in});
    }
    if (args.grad_up != nullptr) {
      const int64_t count = args.last_up - args.first_up;
      T* sum = args.grad_up + chunk * count * d_out;
      gemm<T>({count, d_out, rows, h + args.first_up, 1, row_size, grad.data, grad.stride, first ? nullptr : sum, d_out,
               sum, d_out});
    }
    if (args.grad_b_down == nullptr) return;
    T* sum = args.grad_b_down + chunk * r;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < r; ++j) sum[j] += grad_z[i * row_size + j];
  }

  template <typename T>
  static SAFE_KERNELS_INLINE void write_grad_x(const BottleneckBackwardArgs<T>& args, int64_t row, int64_t rows,
                                               const T* grad_z, T* copy) {
    const int64_t d_in = args.d_in;
    const bool direct = args.grad_x.dtype == c10::CppTypeToScalarType<T>::value;
    T* grad_x = direct ? static_cast<T*>(args.grad_x.data) + row * d_in : copy;
    gemm<T>({rows, d_in, args.r, grad_z, args.down.stride + kOne, 1, args.W_down, d_in, nullptr, 0, grad_x, d_in});
    if (!direct)
      for (int64_t i = 0; i < rows; ++i) write_row(args.grad_x, row + i, grad_x + i * d_in);
  }
};

SAFE_KERNELS_REAL_VARIANTS(forward_rows, run_kind<BottleneckForward>, BottleneckForwardArgs)
SAFE_KERNELS_REAL_VARIANTS(backward_chunks, run_kind<BottleneckBackward>, BottleneckBackwardArgs)

std::vector<int64_t> with_last(const Tensor& tensor, int64_t size) {
  auto sizes = tensor.sizes().vec();
  sizes.back() = size;
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_cpu(const Tensor& x, const Tensor& residual, const Tensor& W_down,
                                                  const Tensor& b_down, const Tensor& W_up, const Tensor& b_up,
                                                  std::string_view activation, double scaling, double dropout_p,
                                                  const std::optional<Tensor>& rng_state,
                                                  const std::optional<Tensor>& block_starts, int64_t block_rows,
                                                  const std::optional<Tensor>& row_weight) {
  check_bottleneck(x, residual, W_down, b_down, W_up, b_up, activation, scaling, dropout_p, rng_state, block_starts,
                   block_rows, row_weight);
  const auto dtype = compute_dtype({x, residual, W_down});
  const bool scores = given(block_starts);
  const int64_t r = W_down.size(0);
  const Tensor down = padded(W_down.t(), dtype), bias = padded(b_down.unsqueeze(0), dtype);
  const Tensor up = at::cat({W_up.to(dtype).t(), (b_up.to(dtype) * scaling).unsqueeze(0)}).contiguous();
  const Tensor out = empty_like_rows(residual);
  const Tensor z =
      at::empty(with_last(x, r), x.options().dtype(c10::promoteTypes(x.scalar_type(), W_down.scalar_type())));
  const Rows x_rows(x), residual_rows(residual);
  const Tensor h = at::empty({scores ? x_rows.count : 0, down.size(1) + kOne}, down.options());
  // Rows without features are skipped: there may be any number of them.
  const int64_t rows = scores || out.numel() > 0 || z.numel() > 0 ? x_rows.count : 0;
  AT_DISPATCH_FLOATING_TYPES(dtype, "bottleneck", [&] {
    const BottleneckForwardArgs<scalar_t> args{
        {x_rows, down.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), down.size(1)},
        residual_rows,
        Rows(out),
        Rows(z),
        up.const_data_ptr<scalar_t>(),
        r,
        static_cast<scalar_t>(scaling),
        kind_of(activation),
        make_dropout(dropout_p, rng_state),
        scores ? h.mutable_data_ptr<scalar_t>() : nullptr};
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
  });
  Tensor statistics = at::empty({0}, x.options().dtype(at::kDouble));
  if (scores)  // b_up shifts all rows by the same vector, and centring removes it
    statistics = score(residual_rows, h, padded(W_up, dtype, kOne), r, *block_starts, block_rows, row_weight);
  return {out, z, statistics};
}

// z by the same products in the same order as in forward: a ReLU must stop the gradient where it stopped x.
Tensor remake_z(const Tensor& x, const Tensor& W_down, const Tensor& b_down) {
  const Tensor down = padded(W_down.t(), x.scalar_type()), bias = padded(b_down.unsqueeze(0), x.scalar_type());
  const Rows rows(x);
  const int64_t stride = down.size(1);
  const Tensor z = at::empty({rows.count, stride}, down.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "remake_z", [&] {
    const auto* data = static_cast<const scalar_t*>(rows.data);
    at::parallel_for(0, rows.count, 64, [&](int64_t begin, int64_t end) {
      gemm<scalar_t>({end - begin, stride, rows.columns, data + begin * rows.stride, rows.stride, 1,
                      down.const_data_ptr<scalar_t>(), stride, bias.const_data_ptr<scalar_t>(), 0,
                      z.mutable_data_ptr<scalar_t>() + begin * stride, stride});
    });
  });
  return z.narrow(1, 0, W_down.size(0));
}

// For tensors of one dtype. BLAS multiplies faster than gemm.h at the ranks of these adapters: with 48 units for 768
// features and AVX-512, backward takes half of the time of the sweep.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_by_blas(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& z, const Tensor& W_down,
    const Tensor& b_down, const Tensor& W_up, std::string_view activation, double scaling, double dropout_p,
    const std::optional<Tensor>& rng_state, const std::array<bool, 5>& output_mask) {
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  const auto [wants_x, wants_W_down, wants_b_down, wants_W_up, wants_b_up] = output_mask;
  const auto none = [&] { return at::empty({0}, grad.options()); };
  const Tensor rows = matrix_of(grad);
  Tensor grad_x = none(), grad_W_down = none(), grad_b_down = none(), grad_W_up = none();
  const Tensor grad_b_up = wants_b_up ? rows.sum(0).mul_(scaling) : none();
  const bool wants_slope = wants_x || wants_W_down || wants_b_down;
  const Tensor hidden = !wants_slope && !wants_W_up ? none() : given(z) ? matrix_of(*z) : remake_z(*x, W_down, b_down);
  if (wants_W_up) {
    const Tensor h = run_activation(hidden, Tensor(), activation, dropout_p, rng_state);
    grad_W_up = rows.t().mm(h).mul_(scaling);
  }
  if (wants_slope) {
    const Tensor grad_h = rows.mm(W_up).mul_(scaling);
    const Tensor grad_z =
        std::get<0>(run_activation_backward(grad_h, hidden, Tensor(), activation, dropout_p, rng_state, {true, false}));
    if (wants_x) grad_x = grad_z.mm(W_down).reshape(with_last(grad, W_down.size(1)));
    if (wants_W_down) grad_W_down = grad_z.t().mm(matrix_of(*x));
    if (wants_b_down) grad_b_down = grad_z.sum(0);
  }
  return {grad_x, grad_W_down, grad_b_down, grad_W_up, grad_b_up};
}

bool have_one_dtype(const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& z,
                    const Tensor& W_down) {
  const auto dtype = grad.scalar_type();
  const auto fits = [&](const std::optional<Tensor>& one) { return !given(one) || one->scalar_type() == dtype; };
  return (dtype == at::kFloat || dtype == at::kDouble) && fits(x) && fits(z) && fits(W_down);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward_cpu(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& z, const Tensor& W_down,
    const Tensor& b_down, const Tensor& W_up, std::string_view activation, double scaling, double dropout_p,
    const std::optional<Tensor>& rng_state, std::array<bool, 5> output_mask) {
  check_bottleneck_backward(grad, x, z, W_down, b_down, W_up, activation, scaling, dropout_p, rng_state, output_mask);
  const auto [wants_x, wants_W_down, wants_b_down, wants_W_up, wants_b_up] = output_mask;
  const auto dtype = compute_dtype({grad, x, z, W_down});
  const int64_t r = W_down.size(0), d_in = W_down.size(1), d_out = W_up.size(0);
  if (have_one_dtype(grad, x, z, W_down) && grad.numel() > 0 && W_down.numel() > 0)
    return backward_by_blas(grad, x, z, W_down, b_down, W_up, activation, scaling, dropout_p, rng_state, output_mask);
  const bool wants_z = wants_x || wants_W_down || wants_b_down || wants_W_up;
  const bool reads_x = wants_W_down || (wants_z && !given(z));
  const Tensor weight = W_down.to(dtype).contiguous(), down = padded(W_down.t(), dtype);
  const Tensor bias = padded(b_down.unsqueeze(0), dtype), up = padded(W_up, dtype, kOne);
  const Tensor grad_x = at::empty(wants_x ? at::IntArrayRef(with_last(grad, d_in)) : at::IntArrayRef({0}),
                                  (given(x) ? *x : grad).options().memory_format(at::MemoryFormat::Contiguous));
  const Rows grads(grad);
  const int64_t chunk_rows = std::max<int64_t>(128, (grads.count + 31) / 32);
  const int64_t chunks = d_out == 0 ? 0 : (grads.count + chunk_rows - 1) / chunk_rows;
  const int64_t first_up = wants_W_up ? 0 : r, last_up = wants_b_up ? r + 1 : r;
  const auto sums = [&](bool wanted, int64_t rows, int64_t columns) {
    return at::empty({wanted ? chunks : 0, rows, columns}, weight.options());
  };
  const Tensor sum_down = sums(wants_W_down, r, d_in), sum_b = sums(wants_b_down, 1, r);
  const Tensor sum_up = sums(last_up > first_up, last_up - first_up, d_out);
  AT_DISPATCH_FLOATING_TYPES(dtype, "bottleneck_backward", [&] {
    const auto data = [](bool wanted, const Tensor& sum) {
      return wanted ? sum.mutable_data_ptr<scalar_t>() : nullptr;
    };
    const BottleneckBackwardArgs<scalar_t> args{
        {reads_x ? Rows(*x) : Rows(), down.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), down.size(1)},
        grads,
        wants_z && given(z) ? Rows(*z) : Rows(),
        wants_x ? Rows(grad_x) : Rows(),
        weight.const_data_ptr<scalar_t>(),
        up.const_data_ptr<scalar_t>(),
        d_in,
        r,
        static_cast<scalar_t>(scaling),
        kind_of(activation),
        make_dropout(dropout_p, rng_state),
        data(wants_W_down, sum_down),
        data(wants_b_down, sum_b),
        data(last_up > first_up, sum_up),
        first_up,
        last_up,
        wants_z,
        chunk_rows};
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { backward_chunks(args, begin, end); });
  });
  if (d_out == 0) grad_x.zero_();
  const auto made = [&](bool wanted, const auto& make) {
    return wanted ? make().to(W_down.scalar_type()).contiguous() : at::empty({0}, W_down.options());
  };
  const Tensor grad_up = sum_up.sum(0);
  return {grad_x, made(wants_W_down, [&] { return sum_down.sum(0); }),
          made(wants_b_down, [&] { return sum_b.sum(0).squeeze(0); }),
          made(wants_W_up, [&] { return grad_up.narrow(0, 0, r).t(); }),
          made(wants_b_up, [&] { return grad_up[last_up - first_up - 1] * scaling; })};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("bottleneck", bottleneck_cpu);
  m.impl("bottleneck_backward", bottleneck_backward_cpu);
}

}  // namespace safe_kernels::cpu
