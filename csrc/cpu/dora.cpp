// DoRA on a CPU: BLAS computes the products with the layer's weight, `dropout` and `lora` the rest. The layer is
// x W' + bias + (scale - 1) y W' + scaling * (y A') (scale B)', with scale = magnitude / norm and y = dropout(x).

#include "ops/dora.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/rows.h"
#include "ops/dropout.h"
#include "ops/lora.h"

namespace safe_kernels::cpu {

namespace {

// Autocast would compute the norm in 16 bits.
using WithoutAutocast = c10::impl::ExcludeDispatchKeyGuard;

constexpr int64_t kNormElements = 64 * 1024;  // a few rows of weight, that stay in the cache

// The norm of each row of weight + scaling * B A, of which only a few rows exist at a time. The sum of its terms
// |w|^2 + 2 scaling (w A')b + scaling^2 b (A A')b would need no row at all, but cancels if the adapter undoes a weight.
// A scaling of 0 multiplies B and not the product, which BLAS would leave out: NaN stays NaN.
Tensor weight_norm(const Tensor& weight, const Tensor& A, const Tensor& scaled_B) {
  const int64_t d_out = weight.size(0);
  const int64_t rows = std::max<int64_t>(1, kNormElements / std::max<int64_t>(1, weight.size(1)));
  Tensor norm = at::empty({d_out}, A.options());
  for (int64_t first = 0; first < d_out; first += rows) {
    const int64_t count = std::min(rows, d_out - first);
    const Tensor part = weight.narrow(0, first, count).to(A.scalar_type());
    const Tensor changed = at::addmm(part, scaled_B.narrow(0, first, count), A);
    norm.narrow(0, first, count).copy_(at::linalg_vector_norm(changed, 2, 1));
  }
  return norm;
}

std::tuple<Tensor, Tensor> dora_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude, double scaling,
                                    double dropout_p, const std::optional<Tensor>& rng_state) {
  check_dora(x, weight, bias, lora_A, lora_B, magnitude, scaling, dropout_p, rng_state);
  const WithoutAutocast guard(c10::autocast_dispatch_keyset);
  const auto dtype = compute_dtype({x, weight, lora_A, lora_B, magnitude});
  const Tensor A = lora_A.to(dtype), B = lora_B.to(dtype);
  // Rounded as in PEFT: a new adapter, whose magnitude is such a norm, changes nothing.
  const Tensor norm = weight_norm(weight, A, B * scaling).to(lora_A.scalar_type());
  const Tensor scale = magnitude.to(dtype) / norm.to(dtype);
  const Tensor W = weight.to(x.scalar_type());
  const auto b = given(bias) ? std::optional(bias->to(x.scalar_type())) : std::nullopt;
  Tensor base;
  if (dropout_p > 0.0) {
    base = at::linear(x, W, b).to(dtype);
    base.addcmul_(at::linear(dropout(x, dropout_p, *rng_state), W), scale - 1);
  } else {
    base = at::linear(x, W).to(dtype).mul_(scale);
    if (b.has_value()) base.add_(*b);
  }
  const auto out = std::get<0>(
      lora(x, base, A, B * scale.unsqueeze(1), scaling, dropout_p, rng_state, std::nullopt, 0, std::nullopt));
  return {out.to(x.scalar_type()), norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_backward_cpu(const Tensor& grad, const std::optional<Tensor>& x,
                                                             const Tensor& weight, const Tensor& lora_A,
                                                             const Tensor& lora_B, const Tensor& magnitude,
                                                             const Tensor& norm, double scaling, double dropout_p,
                                                             const std::optional<Tensor>& rng_state,
                                                             std::array<bool, 4> output_mask) {
  check_dora_backward(grad, x, weight, lora_A, lora_B, magnitude, norm, scaling, dropout_p, rng_state, output_mask);
  const WithoutAutocast guard(c10::autocast_dispatch_keyset);
  const auto [want_x, want_A, want_B, want_magnitude] = output_mask;
  const auto dtype = compute_dtype({grad, weight, lora_A, lora_B, magnitude});
  const Tensor A = lora_A.to(dtype), B = lora_B.to(dtype), W = weight.to(grad.scalar_type()), rows = matrix_of(grad);
  const Tensor scale = magnitude.to(dtype) / norm.to(dtype);
  const bool drops = dropout_p > 0.0;
  auto [grad_x, grad_A, grad_scaled_B] = lora_backward(grad, x, A, B * scale.unsqueeze(1), scaling, dropout_p,
                                                       rng_state, {want_x, want_A, want_B || want_magnitude});
  Tensor grad_magnitude = at::empty({0}, magnitude.options());
  if (want_magnitude) {
    // As in PEFT: with dropout, the product is computed in the wider dtype of x and the adapter.
    const auto wide = drops ? c10::promoteTypes(grad.scalar_type(), lora_A.scalar_type()) : grad.scalar_type();
    const Tensor input = x->to(wide), y = drops ? dropout(input, dropout_p, *rng_state) : input;
    const Tensor product = at::linear(matrix_of(y), weight.to(wide)).to(dtype).mul_(rows);
    grad_magnitude = (product.sum(0).add_((grad_scaled_B * B).sum(1)) / norm).to(magnitude.scalar_type());
  }
  if (want_x) {
    Tensor rows_x = matrix_of(grad_x);
    const Tensor part = (rows * (drops ? scale - 1 : scale)).to(W.scalar_type()).mm(W);
    rows_x.add_(drops ? dropout(part, dropout_p, *rng_state) : part);
    if (drops) rows_x.addmm_(rows, W);
  }
  const Tensor grad_B = want_B ? grad_scaled_B * scale.unsqueeze(1) : at::empty({0}, B.options());
  return {grad_x, grad_A.to(lora_A.scalar_type()), grad_B.to(lora_B.scalar_type()), grad_magnitude};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("dora", dora_cpu);
  m.impl("dora_backward", dora_backward_cpu);
}

}  // namespace safe_kernels::cpu
