// Dropout on a CPU: random bits are generated while a row is in the cache, and never stored.

#include "cpu/dropout.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "ops/dropout.h"

namespace safe_kernels::cpu {

namespace {

template <typename T>
struct DropoutArgs {
  Rows x, out;
  Dropout dropout;
};

template <typename T>
SAFE_KERNELS_INLINE void dropout_body(const DropoutArgs<T>& args, int64_t begin, int64_t end) {
  const Reader<T> xs(args.x);
  const Writer<T> outs(args.out);
  const Dropper<T> dropper(args.dropout, args.x.columns);
  for (int64_t row = begin; row < end; ++row) {
    dropper.apply(row, xs.row(row), outs.row(row));
    outs.done(row);
  }
}

SAFE_KERNELS_REAL_VARIANTS(dropout_rows, dropout_body, DropoutArgs)

Tensor dropout_cpu(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  check_dropout_op(x, dropout_p, rng_state);
  const Dropout dropout = make_dropout(dropout_p, rng_state);
  if (dropout.threshold == 0) return x.clone(at::MemoryFormat::Contiguous);
  const Tensor out = empty_like_rows(x);
  AT_DISPATCH_FLOATING_TYPES(compute_dtype({x}), "dropout", [&] {
    const DropoutArgs<scalar_t> args{Rows(x), Rows(out), dropout};
    over_rows(args.x, [&](int64_t begin, int64_t end) { dropout_rows(args, begin, end); });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) { m.impl("dropout", dropout_cpu); }

}  // namespace safe_kernels::cpu
