// Rotary position embedding on a CPU: each row of x is read once and written once.

#include "ops/rotary.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/dropout.h"

namespace safe_kernels::cpu {

namespace {

template <typename T>
struct RotaryArgs {
  Rows x, cos, sin, out;  // a row of x is a token with all its heads
  int64_t d;
  bool transposed;
};

template <typename T>
SAFE_KERNELS_INLINE void rotary_body(const RotaryArgs<T>& args, int64_t begin, int64_t end) {
  const Reader<T> xs(args.x), coses(args.cos), sines(args.sin);
  const Writer<T> outs(args.out);
  const int64_t half = args.cos.columns / 2;
  const T sign = args.transposed ? T(-1) : T(1);
  for (int64_t row = begin; row < end; ++row) {
    const T *cos = coses.row(row % args.cos.count), *sin = sines.row(row % args.cos.count);
    const T *before = args.transposed ? sin + half : sin, *after = args.transposed ? sin : sin + half;
    const T *x = xs.row(row), *last = x + args.x.columns;
    for (T* out = outs.row(row); x < last; x += args.d, out += args.d) {
#pragma GCC ivdep
      for (int64_t j = 0; j < half; ++j) {
        out[j] = x[j] * cos[j] - sign * x[half + j] * before[j];
        out[half + j] = x[half + j] * cos[half + j] + sign * x[j] * after[j];
      }
      std::copy(x + 2 * half, x + args.d, out + 2 * half);
    }
    outs.done(row);
  }
}

SAFE_KERNELS_REAL_VARIANTS(rotary_rows, rotary_body, RotaryArgs)

Tensor rotary_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  check_rotary(x, cos, sin, transposed);
  const Tensor out = empty_like_rows(x);
  AT_DISPATCH_FLOATING_TYPES(compute_dtype({x, cos}), "rotary", [&] {
    const RotaryArgs<scalar_t> args{Rows(x.flatten(2)),   Rows(cos), Rows(sin),
                                    Rows(out.flatten(2)), x.size(3), transposed};
    over_rows(args.x, [&](int64_t begin, int64_t end) { rotary_rows(args, begin, end); });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) { m.impl("rotary", rotary_cpu); }

}  // namespace safe_kernels::cpu
