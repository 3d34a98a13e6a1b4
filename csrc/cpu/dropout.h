// Shared by the element-wise kernels: reading and writing one row at a time, with dropout.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "cpu/philox.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace safe_kernels::cpu {

inline Dropout make_dropout(double dropout_p, const std::optional<at::Tensor>& rng_state) {
  if (dropout_p == 0.0) return Dropout();
  const at::Tensor state = rng_state->contiguous();
  const int64_t* words = state.const_data_ptr<int64_t>();
  return Dropout(dropout_p, words[0], words[1]);
}

inline at::Tensor empty_like_rows(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().memory_format(at::MemoryFormat::Contiguous));
}

// A tensor's rows in dtype T: its own memory if it has that dtype, otherwise a converted copy of one row.
template <typename T>
struct Reader {
  const Rows& rows;
  std::unique_ptr<T[]> copy;

  explicit Reader(const Rows& rows)
      : rows(rows), copy(scratch<T>(rows.dtype == c10::CppTypeToScalarType<T>::value ? 0 : rows.columns)) {}

  SAFE_KERNELS_INLINE const T* row(int64_t i) const { return read_block(rows, i, i + 1, copy.get()).data; }
};

// The same for a result: fill row(i), then call done(i).
template <typename T>
struct Writer {
  const Rows& rows;
  const bool direct;
  std::unique_ptr<T[]> copy;

  explicit Writer(const Rows& rows)
      : rows(rows),
        direct(rows.dtype == c10::CppTypeToScalarType<T>::value),
        copy(scratch<T>(direct ? 0 : rows.columns)) {}

  SAFE_KERNELS_INLINE T* row(int64_t i) const {
    return direct ? static_cast<T*>(rows.data) + i * rows.stride : copy.get();
  }

  SAFE_KERNELS_INLINE void done(int64_t i) const {
    if (!direct) write_row(rows, i, copy.get());
  }
};

// Dropout of one row at a time.
template <typename T>
struct Dropper {
  const Dropout& dropout;
  const int64_t columns;
  const bool drops;
  std::unique_ptr<uint16_t[]> bits;
  std::unique_ptr<T[]> product;

  Dropper(const Dropout& dropout, int64_t columns)
      : dropout(dropout),
        columns(columns),
        drops(dropout.threshold > 0),
        bits(scratch<uint16_t>(drops ? columns + kColumnsAtOnce : 0)),
        product(scratch<T>(drops ? columns : 0)) {}

  // `out` may be `values` itself.
  SAFE_KERNELS_INLINE void apply(int64_t row, const T* values, T* out) const {
    philox_row(dropout, static_cast<uint32_t>(row), columns, bits.get());
    const uint16_t* bit = bits.get();
    const int32_t threshold = dropout.threshold;
    const T scale = static_cast<T>(dropout.scale);
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) out[j] = values[j] * (bit[j] < threshold ? T(0) : scale);
  }

  SAFE_KERNELS_INLINE void in_place(int64_t row, T* values) const {
    if (drops) apply(row, values, values);
  }

  SAFE_KERNELS_INLINE const T* elsewhere(int64_t row, const T* values) const {
    if (!drops) return values;
    apply(row, values, product.get());
    return product.get();
  }
};

// Rows are independent of each other, so the result does not depend on the number of threads.
template <typename Run>
void over_rows(const Rows& rows, const Run& run) {
  if (rows.columns == 0) return;
  at::parallel_for(0, rows.count, std::max<int64_t>(1, 16384 / rows.columns), run);
}

}  // namespace safe_kernels::cpu
