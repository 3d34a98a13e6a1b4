// Activation and dropout on a CPU, in one read and one write of each tensor.

#include "ops/activation.h"

#include <torch/library.h>

#include "cpu/activations.h"
#include "cpu/dropout.h"

namespace safe_kernels::cpu {

namespace {

template <typename T>
struct ActivationForwardArgs {
  Rows x, out;
  Kind kind;
  Dropout dropout;
};

struct ActivationForward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const ActivationForwardArgs<T>& args, int64_t begin, int64_t end) {
    const int64_t columns = args.x.columns;
    const Reader<T> xs(args.x);
    const Writer<T> outs(args.out);
    const Dropper<T> dropper(args.dropout, columns);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = xs.row(row);
      T* out = outs.row(row);
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) out[j] = Activation::value(x[j]);
      dropper.in_place(row, out);
      outs.done(row);
    }
  }
};

template <typename T>
struct ActivationBackwardArgs {
  Rows grad, x, grad_x;
  Kind kind;
  Dropout dropout;
};

struct ActivationBackward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const ActivationBackwardArgs<T>& args, int64_t begin, int64_t end) {
    const int64_t columns = args.x.columns;
    const Reader<T> grads(args.grad), xs(args.x);
    const Writer<T> outs(args.grad_x);
    const Dropper<T> dropper(args.dropout, columns);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = xs.row(row);
      const T* grad = dropper.elsewhere(row, grads.row(row));
      T* out = outs.row(row);
      T value;
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) out[j] = Activation::pull_back(x[j], grad[j], value);
      outs.done(row);
    }
  }
};

SAFE_KERNELS_VARIANTS(forward_rows, run_kind<ActivationForward>, ActivationForwardArgs<float>)
SAFE_KERNELS_VARIANTS(forward_rows, run_kind<ActivationForward>, ActivationForwardArgs<double>)
SAFE_KERNELS_VARIANTS(backward_rows, run_kind<ActivationBackward>, ActivationBackwardArgs<float>)
SAFE_KERNELS_VARIANTS(backward_rows, run_kind<ActivationBackward>, ActivationBackwardArgs<double>)

template <typename T>
void run_activation(const Tensor& x, const Tensor& out, Kind kind, const Dropout& dropout) {
  const ActivationForwardArgs<T> args{Rows(x), Rows(out), kind, dropout};
  over_rows(args.x, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
}

template <typename T>
void run_activation_backward(const Tensor& grad, const Tensor& x, const Tensor& grad_x, Kind kind,
                             const Dropout& dropout) {
  const ActivationBackwardArgs<T> args{Rows(grad), Rows(x), Rows(grad_x), kind, dropout};
  over_rows(args.x, [&](int64_t begin, int64_t end) { backward_rows(args, begin, end); });
}

Tensor activation_cpu(const Tensor& x, std::string_view kind, double dropout_p,
                      const std::optional<Tensor>& rng_state) {
  check_activation(x, kind, dropout_p, rng_state);
  const Tensor out = empty_like_rows(x);
  const auto run = x.scalar_type() == at::kDouble ? run_activation<double> : run_activation<float>;
  run(x, out, kind_of(kind), make_dropout(dropout_p, rng_state));
  return out;
}

Tensor activation_backward_cpu(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                               const std::optional<Tensor>& rng_state) {
  check_activation_backward(grad, x, kind, dropout_p, rng_state);
  const Tensor grad_x = empty_like_rows(x);
  const auto run = x.scalar_type() == at::kDouble ? run_activation_backward<double> : run_activation_backward<float>;
  run(grad, x, grad_x, kind_of(kind), make_dropout(dropout_p, rng_state));
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("activation", activation_cpu);
  m.impl("activation_backward", activation_backward_cpu);
}

}  // namespace safe_kernels::cpu
