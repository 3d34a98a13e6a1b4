#include "ops/layer_norm.h"

#include <torch/library.h>

#include "cpu/norms.h"

namespace safe_kernels::cpu {

namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps,
                                                  bool /*retain_output*/) {
  check_layer_norm(x, weight, bias, eps);
  return norm_forward(x, {weight, 0.0, bias}, eps, /*centred=*/true);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad, const Tensor& retained,
                                                           const std::optional<Tensor>& weight,
                                                           const std::optional<Tensor>& bias,
                                                           const std::optional<Tensor>& mean, const Tensor& rstd,
                                                           bool from_output, std::array<bool, 3> output_mask) {
  check_layer_norm_backward(grad, retained, weight, bias, mean, rstd, from_output, output_mask);
  return norm_backward(grad, retained, {weight, 0.0, bias}, mean, rstd, /*centred=*/true, from_output, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("layer_norm", layer_norm_cpu);
  m.impl("layer_norm_backward", layer_norm_backward_cpu);
}

}  // namespace safe_kernels::cpu
