// Activations on a CPU, plain and gated, with dropout: each tensor is read or written once.

#include "ops/activation.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "cpu/activations.h"
#include "cpu/dropout.h"

namespace safe_kernels::cpu {

namespace {

template <typename T>
struct ActivationForwardArgs {
  Rows gate, up, out;  // up without data: not gated
  Kind kind;
  Dropout dropout;
};

struct ActivationForward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const ActivationForwardArgs<T>& args, int64_t begin, int64_t end) {
    const int64_t columns = args.gate.columns;
    const Reader<T> gates(args.gate), ups(args.up);
    const Writer<T> outs(args.out);
    const Dropper<T> dropper(args.dropout, columns);
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = gates.row(row);
      T* out = outs.row(row);
      if (args.up.data == nullptr) {
#pragma GCC ivdep
        for (int64_t j = 0; j < columns; ++j) out[j] = Activation::value(gate[j]);
      } else {
        const T* up = ups.row(row);
#pragma GCC ivdep
        for (int64_t j = 0; j < columns; ++j) out[j] = Activation::value(gate[j]) * up[j];
      }
      dropper.in_place(row, out);
      outs.done(row);
    }
  }
};

template <typename T>
struct ActivationBackwardArgs {
  Rows grad, gate, up, grad_gate, grad_up;  // up without data: not gated; a gradient without data: not wanted
  Kind kind;
  Dropout dropout;
};

struct ActivationBackward {
  template <class Activation, typename T>
  static SAFE_KERNELS_INLINE void run(const ActivationBackwardArgs<T>& args, int64_t begin, int64_t end) {
    const int64_t columns = args.gate.columns;
    const bool is_gated = args.up.data != nullptr;
    const bool wants_gate = args.grad_gate.data != nullptr, wants_up = args.grad_up.data != nullptr;
    const Reader<T> grads(args.grad), gates(args.gate), ups(args.up);
    const Writer<T> gate_outs(args.grad_gate), up_outs(args.grad_up);
    const Dropper<T> dropper(args.dropout, columns);
    for (int64_t row = begin; row < end; ++row) {
      const T *gate = gates.row(row), *grad = dropper.elsewhere(row, grads.row(row));
      if (!is_gated) {
        gradients<Activation, false, true, false, T>(grad, gate, nullptr, columns, gate_outs.row(row), nullptr);
      } else if (wants_gate && wants_up) {
        gradients<Activation, true, true, true>(grad, gate, ups.row(row), columns, gate_outs.row(row),
                                                up_outs.row(row));
      } else if (wants_gate) {
        gradients<Activation, true, true, false, T>(grad, gate, ups.row(row), columns, gate_outs.row(row), nullptr);
      } else {
        gradients<Activation, true, false, true, T>(grad, gate, nullptr, columns, nullptr, up_outs.row(row));
      }
      if (wants_gate) gate_outs.done(row);
      if (wants_up) up_outs.done(row);
    }
  }

  // Pointers that the flags exclude are null.
  template <class Activation, bool kGated, bool kWantsGate, bool kWantsUp, typename T>
  static SAFE_KERNELS_INLINE void gradients(const T* grad, const T* gate, const T* up, int64_t columns, T* grad_gate,
                                            T* grad_up) {
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      T value;
      if constexpr (kWantsGate) {
        const T before = kGated ? grad[j] * up[j] : grad[j];
        grad_gate[j] = Activation::pull_back(gate[j], before, value);
      } else {
        value = Activation::value(gate[j]);
      }
      if constexpr (kWantsUp) grad_up[j] = grad[j] * value;
    }
  }
};

SAFE_KERNELS_REAL_VARIANTS(forward_rows, run_kind<ActivationForward>, ActivationForwardArgs)
SAFE_KERNELS_REAL_VARIANTS(backward_rows, run_kind<ActivationBackward>, ActivationBackwardArgs)

Rows rows_if(bool exists, const Tensor& tensor) { return exists ? Rows(tensor) : Rows(); }

Tensor activation_cpu(const Tensor& x, std::string_view kind, double dropout_p,
                      const std::optional<Tensor>& rng_state) {
  check_activation(x, kind, dropout_p, rng_state);
  return run_activation(x, Tensor(), kind, dropout_p, rng_state);
}

Tensor activation_backward_cpu(const Tensor& grad, const Tensor& x, std::string_view kind, double dropout_p,
                               const std::optional<Tensor>& rng_state) {
  check_activation_backward(grad, x, kind, dropout_p, rng_state);
  return std::get<0>(run_activation_backward(grad, x, Tensor(), kind, dropout_p, rng_state, {true, false}));
}

}  // namespace

Tensor run_activation(const Tensor& gate, const Tensor& up, std::string_view kind, double dropout_p,
                      const std::optional<Tensor>& rng_state) {
  const Tensor out = empty_like_rows(gate);
  AT_DISPATCH_FLOATING_TYPES(compute_dtype({gate}), "activation", [&] {
    const ActivationForwardArgs<scalar_t> args{Rows(gate), rows_if(up.defined(), up), Rows(out), kind_of(kind),
                                               make_dropout(dropout_p, rng_state)};
    over_rows(args.gate, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> run_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                   std::string_view kind, double dropout_p,
                                                   const std::optional<Tensor>& rng_state,
                                                   const std::array<bool, 2>& wanted) {
  const auto make = [&](bool is_wanted) { return is_wanted ? empty_like_rows(gate) : at::empty({0}, gate.options()); };
  const Tensor grad_gate = make(wanted[0]), grad_up = make(wanted[1]);
  if (!wanted[0] && !wanted[1]) return {grad_gate, grad_up};
  AT_DISPATCH_FLOATING_TYPES(compute_dtype({gate}), "activation_backward", [&] {
    const ActivationBackwardArgs<scalar_t> args{Rows(grad),
                                                Rows(gate),
                                                rows_if(up.defined(), up),
                                                rows_if(wanted[0], grad_gate),
                                                rows_if(wanted[1], grad_up),
                                                kind_of(kind),
                                                make_dropout(dropout_p, rng_state)};
    over_rows(args.gate, [&](int64_t begin, int64_t end) { backward_rows(args, begin, end); });
  });
  return {grad_gate, grad_up};
}

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("activation", activation_cpu);
  m.impl("activation_backward", activation_backward_cpu);
}

}  // namespace safe_kernels::cpu
