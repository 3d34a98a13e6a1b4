// A linear layer and its adapter on a CPU: BLAS computes the products with the layer's weight, and `lora` the rest.
// Forward rounds like PEFT. Backward adds the layer's part of the gradient of x to the adapter's part in place.

#include "ops/lora_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "cpu/rows.h"
#include "ops/lora.h"

namespace safe_kernels::cpu {

namespace {

std::tuple<Tensor, Tensor> lora_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                           const std::optional<Tensor>& rng_state,
                                           const std::optional<Tensor>& block_starts, int64_t block_rows,
                                           const std::optional<Tensor>& row_weight) {
  check_lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, rng_state, block_starts, block_rows,
                    row_weight);
  return lora(x, at::linear(x, weight, bias), lora_A, lora_B, scaling, dropout_p, rng_state, block_starts, block_rows,
              row_weight);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
    std::array<bool, 5> output_mask) {
  check_lora_linear_backward(grad, x, weight, lora_A, lora_B, scaling, dropout_p, rng_state, output_mask);
  const auto [want_x, want_weight, want_bias, want_A, want_B] = output_mask;
  const auto dtype = weight.scalar_type();
  const Tensor typed = grad.to(dtype), rows = matrix_of(typed);
  Tensor grad_x = at::empty({0}, weight.options()), grad_weight = at::empty_like(grad_x),
         grad_bias = at::empty_like(grad_x);
  Tensor grad_A = at::empty({0}, lora_A.options()), grad_B = at::empty({0}, lora_B.options());
  if (want_x || want_A || want_B)
    std::tie(grad_x, grad_A, grad_B) =
        lora_backward(typed, x, lora_A, lora_B, scaling, dropout_p, rng_state, {want_x, want_A, want_B});
  grad_x = grad_x.to(dtype);
  if (want_x) matrix_of(grad_x).addmm_(rows, weight);
  if (want_weight) grad_weight = rows.t().mm(matrix_of(x->to(dtype)));
  if (want_bias) grad_bias = rows.sum(0);
  return {grad_x, grad_weight, grad_bias, grad_A, grad_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("lora_linear", lora_linear_cpu);
  m.impl("lora_linear_backward", lora_linear_backward_cpu);
}

}  // namespace safe_kernels::cpu
