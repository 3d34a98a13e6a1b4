// The activations, element by element: value(x), and pull_back(x, grad, value) = grad * value'(x), which also returns
// the value. The formulas are in safe_kernels/reference/activation.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "cpu/elementary.h"

namespace safe_kernels::cpu {

struct Silu {
  template <typename T>
  static SAFE_KERNELS_INLINE T value(T x) {
    return x / (T(1) + exponential(-x));
  }

  template <typename T>
  static SAFE_KERNELS_INLINE T pull_back(T x, T grad, T& value) {
    const T s = logistic(x);
    value = x * s;
    return grad * (s * (T(1) + x * (T(1) - s)));
  }
};

struct Gelu {
  template <typename T>
  static SAFE_KERNELS_INLINE T value(T x) {
    return x * normal(x).cdf;
  }

  template <typename T>
  static SAFE_KERNELS_INLINE T pull_back(T x, T grad, T& value) {
    const Normal<T> n = normal(x);
    value = x * n.cdf;
    return grad * (n.cdf + x * n.density);
  }
};

// 0.5 (1 + tanh(u)) is the logistic function of 2u.
struct GeluTanh {
  template <typename T>
  static SAFE_KERNELS_INLINE T twice_u(T x) {
    return x * (T(1.5957691216057308) + T(0.071354816272600249) * x * x);  // 2 sqrt(2 / pi), and 0.044715 times that
  }

  template <typename T>
  static SAFE_KERNELS_INLINE T value(T x) {
    return x / (T(1) + exponential(-twice_u(x)));
  }

  template <typename T>
  static SAFE_KERNELS_INLINE T pull_back(T x, T grad, T& value) {
    // Beyond +-10 the derivative is exactly 0 or 1, but x^2 and e would overflow and give 0 * inf.
    T z = x < T(-10) ? T(-10) : x;
    z = z > T(10) ? T(10) : z;
    const T e = exponential(-twice_u(z)), s = T(1) / (T(1) + e);
    value = (x < T(0) ? z : x) * s;
    const T slope = T(1.5957691216057308) + T(0.21406444881780073) * z * z;  // of twice_u
    return grad * (s + z * slope * (e * s * s));                             // e s = 1 - s, without cancellation
  }
};

struct Relu {
  template <typename T>
  static SAFE_KERNELS_INLINE T value(T x) {
    return x < T(0) ? T(0) : x;
  }

  template <typename T>
  static SAFE_KERNELS_INLINE T pull_back(T x, T grad, T& value) {
    value = x < T(0) ? T(0) : x;
    return x <= T(0) ? T(0) : grad;  // selected, not multiplied: it stops an infinite gradient too
  }
};

enum class Kind { kSilu, kGelu, kGeluTanh, kRelu };

// `name` must have passed check_kind.
inline Kind kind_of(std::string_view name) {
  if (name == "silu") return Kind::kSilu;
  if (name == "gelu") return Kind::kGelu;
  return name == "gelu_tanh" ? Kind::kGeluTanh : Kind::kRelu;
}

// Calls Sweep::run<Activation>(args, begin, end) for the activation args.kind.
template <class Sweep, class Args>
SAFE_KERNELS_INLINE void run_kind(const Args& args, int64_t begin, int64_t end) {
  switch (args.kind) {
    case Kind::kSilu:
      return Sweep::template run<Silu>(args, begin, end);
    case Kind::kGelu:
      return Sweep::template run<Gelu>(args, begin, end);
    case Kind::kGeluTanh:
      return Sweep::template run<GeluTanh>(args, begin, end);
    case Kind::kRelu:
      return Sweep::template run<Relu>(args, begin, end);
  }
}

// The kernels of both ops, in activation.cpp: dropout(act(gate) * up), and its gradients. `up` is undefined for a plain
// activation; an unwanted gradient has shape [0].
at::Tensor run_activation(const at::Tensor& gate, const at::Tensor& up, std::string_view kind, double dropout_p,
                          const std::optional<at::Tensor>& rng_state);
std::tuple<at::Tensor, at::Tensor> run_activation_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                           const at::Tensor& up, std::string_view kind,
                                                           double dropout_p, const std::optional<at::Tensor>& rng_state,
                                                           const std::array<bool, 2>& wanted);

}  // namespace safe_kernels::cpu
