// dropout(act(gate) * up) on a CPU, in one read and one write of each tensor, forward and backward.

#include "ops/gated_activation.h"

#include <torch/library.h>

#include "cpu/activations.h"
#include "cpu/dropout.h"

namespace safe_kernels::cpu {

namespace {

template <typename T>
struct GatedForwardArgs {
  Rows gate, up, out;
  Kind kind;
  Dropout dropout;
};

struct GatedForward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const GatedForwardArgs<T>& args, int64_t begin, int64_t end) {
    const int64_t columns = args.gate.columns;
    const Reader<T> gates(args.gate), ups(args.up);
    const Writer<T> outs(args.out);
    const Dropper<T> dropper(args.dropout, columns);
    for (int64_t row = begin; row < end; ++row) {
      const T *gate = gates.row(row), *up = ups.row(row);
      T* out = outs.row(row);
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) out[j] = Activation::value(gate[j]) * up[j];
      dropper.in_place(row, out);
      outs.done(row);
    }
  }
};

template <typename T>
struct GatedBackwardArgs {
  Rows grad, gate, up, grad_gate, grad_up;  // a gradient that is not wanted has no data
  Kind kind;
  Dropout dropout;
};

struct GatedBackward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const GatedBackwardArgs<T>& args, int64_t begin, int64_t end) {
    const int64_t columns = args.gate.columns;
    const bool wants_gate = args.grad_gate.data != nullptr, wants_up = args.grad_up.data != nullptr;
    const Reader<T> grads(args.grad), gates(args.gate), ups(args.up);
    const Writer<T> gate_outs(args.grad_gate), up_outs(args.grad_up);
    const Dropper<T> dropper(args.dropout, columns);
    for (int64_t row = begin; row < end; ++row) {
      const T *gate = gates.row(row), *up = ups.row(row), *grad = dropper.elsewhere(row, grads.row(row));
      if (wants_gate && wants_up) {
        both<Activation>(grad, gate, up, columns, gate_outs.row(row), up_outs.row(row));
      } else if (wants_gate) {
        gate_only<Activation>(grad, gate, up, columns, gate_outs.row(row));
      } else {
        up_only<Activation>(grad, gate, columns, up_outs.row(row));
      }
      if (wants_gate) gate_outs.done(row);
      if (wants_up) up_outs.done(row);
    }
  }

  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void both(const T* grad, const T* gate, const T* up, int64_t columns, T* grad_gate,
                                       T* grad_up) {
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      T value;
      grad_gate[j] = Activation::pull_back(gate[j], grad[j] * up[j], value);
      grad_up[j] = grad[j] * value;
    }
  }

  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void gate_only(const T* grad, const T* gate, const T* up, int64_t columns, T* grad_gate) {
    T value;
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) grad_gate[j] = Activation::pull_back(gate[j], grad[j] * up[j], value);
  }

  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void up_only(const T* grad, const T* gate, int64_t columns, T* grad_up) {
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) grad_up[j] = grad[j] * Activation::value(gate[j]);
  }
};

SAFE_KERNELS_VARIANTS(forward_rows, run_kind<GatedForward>, GatedForwardArgs<float>)
SAFE_KERNELS_VARIANTS(forward_rows, run_kind<GatedForward>, GatedForwardArgs<double>)
SAFE_KERNELS_VARIANTS(backward_rows, run_kind<GatedBackward>, GatedBackwardArgs<float>)
SAFE_KERNELS_VARIANTS(backward_rows, run_kind<GatedBackward>, GatedBackwardArgs<double>)

template <typename T>
void run_gated_activation(const Tensor& gate, const Tensor& up, const Tensor& out, Kind kind, const Dropout& dropout) {
  const GatedForwardArgs<T> args{Rows(gate), Rows(up), Rows(out), kind, dropout};
  over_rows(args.gate, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
}

template <typename T>
void run_gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, const Tensor& grad_gate,
                                   const Tensor& grad_up, Kind kind, const Dropout& dropout,
                                   const std::array<bool, 2>& wanted) {
  const auto rows = [](const Tensor& tensor, bool wanted) { return wanted ? Rows(tensor) : Rows(); };
  const GatedBackwardArgs<T> args{
      Rows(grad), Rows(gate), Rows(up), rows(grad_gate, wanted[0]), rows(grad_up, wanted[1]), kind, dropout};
  over_rows(args.gate, [&](int64_t begin, int64_t end) { backward_rows(args, begin, end); });
}

Tensor gated_activation_cpu(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                            const std::optional<Tensor>& rng_state) {
  check_gated_activation(gate, up, kind, dropout_p, rng_state);
  const Tensor out = empty_like_rows(gate);
  const auto run = gate.scalar_type() == at::kDouble ? run_gated_activation<double> : run_gated_activation<float>;
  run(gate, up, out, kind_of(kind), make_dropout(dropout_p, rng_state));
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_backward_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                         std::string_view kind, double dropout_p,
                                                         const std::optional<Tensor>& rng_state,
                                                         std::array<bool, 2> output_mask) {
  check_gated_activation_backward(grad, gate, up, kind, dropout_p, rng_state, output_mask);
  const auto make = [](const Tensor& like, bool wanted) {
    return wanted ? empty_like_rows(like) : at::empty({0}, like.options());
  };
  const Tensor grad_gate = make(gate, output_mask[0]), grad_up = make(up, output_mask[1]);
  if (!output_mask[0] && !output_mask[1]) return {grad_gate, grad_up};
  const auto run =
      gate.scalar_type() == at::kDouble ? run_gated_activation_backward<double> : run_gated_activation_backward<float>;
  run(grad, gate, up, grad_gate, grad_up, kind_of(kind), make_dropout(dropout_p, rng_state), output_mask);
  return {grad_gate, grad_up};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("gated_activation", gated_activation_cpu);
  m.impl("gated_activation_backward", gated_activation_backward_cpu);
}

}  // namespace safe_kernels::cpu
