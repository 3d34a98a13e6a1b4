// Dropout on a CPU: the bits are made while a row is in cache, and never stored.

#include "cpu/dropout.h"

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

SAFE_KERNELS_VARIANTS(dropout_rows, dropout_body<float>, DropoutArgs<float>)
SAFE_KERNELS_VARIANTS(dropout_rows, dropout_body<double>, DropoutArgs<double>)

template <typename T>
void run_dropout(const Tensor& x, const Tensor& out, const Dropout& dropout) {
  const DropoutArgs<T> args{Rows(x), Rows(out), dropout};
  over_rows(args.x, [&](int64_t begin, int64_t end) { dropout_rows(args, begin, end); });
}

Tensor dropout_cpu(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  check_dropout_op(x, dropout_p, rng_state);
  const Dropout dropout = make_dropout(dropout_p, rng_state);
  if (dropout.threshold == 0) return x.clone(at::MemoryFormat::Contiguous);
  const Tensor out = empty_like_rows(x);
  (x.scalar_type() == at::kDouble ? run_dropout<double> : run_dropout<float>)(x, out, dropout);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) { m.impl("dropout", dropout_cpu); }

}  // namespace safe_kernels::cpu
