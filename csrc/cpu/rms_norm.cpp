#include "ops/rms_norm.h"

#include <torch/library.h>

#include "cpu/norms.h"

namespace safe_kernels::cpu {

namespace {

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                        bool /*retain_output*/) {
  check_rms_norm(x, weight, eps);
  auto [out, mean, rstd] = norm_forward(x, {weight, weight_offset, std::nullopt}, eps, /*centred=*/false);
  return {out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad, const Tensor& retained, const Tensor& weight,
                                                 const Tensor& rstd, double weight_offset, bool from_output,
                                                 std::array<bool, 2> output_mask) {
  check_rms_norm_backward(grad, retained, weight, rstd, weight_offset, from_output, output_mask);
  auto [grad_x, grad_weight, grad_bias] =
      norm_backward(grad, retained, {weight, weight_offset, std::nullopt}, std::nullopt, rstd, /*centred=*/false,
                    from_output, {output_mask[0], output_mask[1], false});
  return {grad_x, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("rms_norm_backward", rms_norm_backward_cpu);
}

}  // namespace safe_kernels::cpu
