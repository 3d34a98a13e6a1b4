// The two sweeps of LoRA over rows: forward and backward. For all products a block of rows of x is read, dropped out
// and converted once, while it is in the cache; no tensor of size [N, d] is made except the results.

#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/philox.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace safe_kernels::cpu {

// Rows per block: they fit in the L2 cache, but are enough for reading and writing a gradient's [r, d] sums once per
// block. A multiple of 6 and 8, the heights of gemm's tiles.
inline int64_t rows_in_block(int64_t columns) { return columns <= 1024 ? 48 : 24; }

// A copy of a [rows, r] matrix, with rows padded with zeros to whole vectors of 8 numbers, and `more`; see lora.cpp.
at::Tensor padded(const at::Tensor& matrix, at::ScalarType dtype, int64_t more = 0);

template <typename T>
SAFE_KERNELS_INLINE void multiply(T* values, const T* factors, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factors[i];
}

template <typename T>
SAFE_KERNELS_INLINE void scale_by(T* values, T factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

template <typename T>
SAFE_KERNELS_INLINE void block_factors(const Dropout& dropout, int64_t begin, int64_t end, int64_t columns,
                                       uint16_t* bits, T* factors) {
  for (int64_t row = begin; row < end; ++row)
    dropout_factors(dropout, row, columns, bits, factors + (row - begin) * columns);
}

// dropout(x) for a block of rows; `factors` is null without dropout.
template <typename T>
SAFE_KERNELS_INLINE Block<T> dropped_block(const Rows& x, int64_t begin, int64_t end, const T* factors, T* copy) {
  if (factors == nullptr) return read_block(x, begin, end, copy);
  for (int64_t row = begin; row < end; ++row) {
    T* target = copy + (row - begin) * x.columns;
    read_row(x, row, 0, x.columns, target);
    multiply(target, factors + (row - begin) * x.columns, x.columns);
  }
  return {copy, x.columns};
}

template <typename T>
struct LoraForwardArgs {
  Rows x, base, out;
  const T* lora_At;  // [d_in, stride]
  const T* lora_Bt;  // [r, d_out]
  int64_t r, stride;
  T scaling;
  Dropout dropout;
  T* h;  // [N, stride], kept for the statistics, or null
};

template <typename T>
SAFE_KERNELS_INLINE void lora_forward_body(const LoraForwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t d_in = args.x.columns, d_out = args.out.columns, stride = args.stride;
  const int64_t step = rows_in_block(std::max(d_in, d_out));
  const bool drops = args.dropout.threshold > 0;
  const bool direct = args.out.dtype == c10::CppTypeToScalarType<T>::value;
  const auto factors = scratch<T>(drops ? step * d_in : 0);
  const auto bits = scratch<uint16_t>(drops ? d_in + kColumnsAtOnce : 0);
  const auto x_copy = scratch<T>(step * d_in);
  const auto base_copy = scratch<T>(step * d_out);
  const auto h_block = scratch<T>(step * stride);
  for (int64_t row = begin; row < end; row += step) {
    const int64_t last = std::min(row + step, end), rows = last - row;
    if (drops) block_factors(args.dropout, row, last, d_in, bits.get(), factors.get());
    const Block<T> x = dropped_block<T>(args.x, row, last, drops ? factors.get() : nullptr, x_copy.get());
    T* h = args.h != nullptr ? args.h + row * stride : h_block.get();
    gemm<T>({rows, stride, d_in, x.data, x.stride, 1, args.lora_At, stride, nullptr, 0, h, stride});
    scale_by(h, args.scaling, rows * stride);
    const Block<T> base = read_block(args.base, row, last, base_copy.get());
    T* out = direct ? static_cast<T*>(args.out.data) + row * d_out : base_copy.get();
    gemm<T>({rows, d_out, args.r, h, stride, 1, args.lora_Bt, d_out, base.data, base.stride, out, d_out});
    if (!direct)
      for (int64_t i = 0; i < rows; ++i) write_row(args.out, row + i, out + i * d_out);
  }
}

template <typename T>
struct LoraBackwardArgs {
  Rows grad, x, grad_x;  // x without data: not needed; grad_x without data: not wanted
  const T* lora_A;       // [r, d_in]
  const T* lora_At;      // [d_in, stride]
  const T* lora_B;       // [d_out, stride]
  int64_t d_in, r, stride;
  T scaling;
  Dropout dropout;
  // Partial sums [chunks, r, d] over chunks of rows. Chunks do not depend on the number of threads, and their sums are
  // added in order, so the gradients are the same to the last bit on any number of threads. Null: not wanted.
  T* grad_A;
  T* grad_Bt;
  int64_t chunk_rows;
};

template <typename T>
SAFE_KERNELS_INLINE void backward_chunk(const LoraBackwardArgs<T>& args, int64_t chunk) {
  const int64_t d_in = args.d_in, d_out = args.grad.columns, stride = args.stride, r = args.r;
  const int64_t begin = chunk * args.chunk_rows;
  const int64_t end = std::min(begin + args.chunk_rows, args.grad.count);
  const int64_t step = rows_in_block(std::max(d_in, d_out));
  const bool drops = args.dropout.threshold > 0;
  const bool wants_x = args.grad_x.data != nullptr;
  const bool reads_x = args.grad_A != nullptr || args.grad_Bt != nullptr;
  const bool direct = args.grad_x.dtype == c10::CppTypeToScalarType<T>::value;
  const auto factors = scratch<T>(drops ? step * d_in : 0);
  const auto bits = scratch<uint16_t>(drops ? d_in + kColumnsAtOnce : 0);
  const auto x_copy = scratch<T>(step * d_in);
  const auto grad_copy = scratch<T>(step * d_out);
  const auto h = scratch<T>(step * stride);
  const auto grad_h = scratch<T>(step * stride);
  for (int64_t row = begin; row < end; row += step) {
    const int64_t last = std::min(row + step, end), rows = last - row;
    const bool first = row == begin;
    if (drops) block_factors(args.dropout, row, last, d_in, bits.get(), factors.get());
    const T* factor = drops ? factors.get() : nullptr;
    const Block<T> grad = read_block(args.grad, row, last, grad_copy.get());
    if (wants_x || args.grad_A != nullptr) {
      gemm<T>({rows, stride, d_out, grad.data, grad.stride, 1, args.lora_B, stride, nullptr, 0, grad_h.get(), stride});
      scale_by(grad_h.get(), args.scaling, rows * stride);
    }
    if (reads_x) {
      const Block<T> x = dropped_block<T>(args.x, row, last, factor, x_copy.get());
      if (args.grad_A != nullptr) {
        T* sum = args.grad_A + chunk * r * d_in;
        gemm<T>({r, d_in, rows, grad_h.get(), 1, stride, x.data, x.stride, first ? nullptr : sum, d_in, sum, d_in});
      }
      if (args.grad_Bt != nullptr) {
        T* sum = args.grad_Bt + chunk * r * d_out;
        gemm<T>({rows, stride, d_in, x.data, x.stride, 1, args.lora_At, stride, nullptr, 0, h.get(), stride});
        scale_by(h.get(), args.scaling, rows * stride);
        gemm<T>({r, d_out, rows, h.get(), 1, stride, grad.data, grad.stride, first ? nullptr : sum, d_out, sum, d_out});
      }
    }
    if (wants_x) {
      T* grad_x = direct ? static_cast<T*>(args.grad_x.data) + row * d_in : x_copy.get();
      gemm<T>({rows, d_in, r, grad_h.get(), stride, 1, args.lora_A, d_in, nullptr, 0, grad_x, d_in});
      if (drops) multiply(grad_x, factor, rows * d_in);
      if (!direct)
        for (int64_t i = 0; i < rows; ++i) write_row(args.grad_x, row + i, grad_x + i * d_in);
    }
  }
}

template <typename T>
SAFE_KERNELS_INLINE void lora_backward_body(const LoraBackwardArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk(args, chunk);
}

}  // namespace safe_kernels::cpu
