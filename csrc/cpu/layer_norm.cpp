#include "ops/layer_norm.h"

#include <torch/library.h>

#include "cpu/norm_rows.h"

namespace safe_kernels::cpu {

namespace {

SAFE_KERNELS_VARIANTS(forward_rows, forward_body<Layer<float>>, NormForward<Layer<float>>)
SAFE_KERNELS_VARIANTS(forward_rows, forward_body<Layer<double>>, NormForward<Layer<double>>)
SAFE_KERNELS_VARIANTS(backward_chunks, backward_body<Layer<float>>, NormBackward<Layer<float>>)
SAFE_KERNELS_VARIANTS(backward_chunks, backward_body<Layer<double>>, NormBackward<Layer<double>>)

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run_layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor out = empty_like_x(x, true), mean = empty_per_row(x, dtype), rstd = empty_per_row(x, dtype);
  const Tensor scale = per_feature(weight, 1.0, x, dtype), shift = per_feature(bias, 0.0, x, dtype);
  const NormForward<Layer<T>> args{Rows(x),
                                   Rows(out),
                                   scale.const_data_ptr<T>(),
                                   shift.const_data_ptr<T>(),
                                   static_cast<T>(eps),
                                   mean.mutable_data_ptr<T>(),
                                   rstd.mutable_data_ptr<T>()};
  at::parallel_for(0, args.x.count, 32, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
  return {out, mean, rstd};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run_layer_norm_backward(const Tensor& grad, const Tensor& retained,
                                                           const std::optional<Tensor>& weight,
                                                           const std::optional<Tensor>& bias,
                                                           const std::optional<Tensor>& mean, const Tensor& rstd,
                                                           bool from_output, const std::array<bool, 3>& wanted) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor scale = per_feature(weight, 1.0, retained, dtype), shift = per_feature(bias, 0.0, retained, dtype);
  const Tensor inverse = from_output ? scale.reciprocal() : Tensor();
  const Tensor row_mean = from_output ? Tensor() : mean->to(dtype).contiguous();
  const Tensor row_rstd = rstd.to(dtype).contiguous();
  const Tensor grad_x = empty_like_x(retained, wanted[0]);
  NormBackward<Layer<T>> args{};
  args.grad = Rows(grad);
  args.retained = Rows(retained);
  if (wanted[0]) args.grad_x = Rows(grad_x);
  args.scale = scale.const_data_ptr<T>();
  args.inverse = from_output ? inverse.const_data_ptr<T>() : nullptr;
  args.bias = shift.const_data_ptr<T>();
  args.mean = from_output ? nullptr : row_mean.const_data_ptr<T>();
  args.rstd = row_rstd.const_data_ptr<T>();
  const Chunks chunks(args.grad.count);
  args.chunk_rows = chunks.rows;
  const Tensor partial_weight = at::empty({wanted[1] ? chunks.count : 0, scale.size(0)}, scale.options());
  const Tensor partial_bias = at::empty({wanted[2] ? chunks.count : 0, scale.size(0)}, scale.options());
  args.grad_weight = wanted[1] ? partial_weight.mutable_data_ptr<T>() : nullptr;
  args.grad_bias = wanted[2] ? partial_bias.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) { backward_chunks(args, begin, end); });
  return {grad_x, sum_of_chunks(partial_weight, wanted[1], (given(weight) ? *weight : retained).options()),
          sum_of_chunks(partial_bias, wanted[2], (given(bias) ? *bias : retained).options())};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps,
                                                  bool /*retain_output*/) {
  check_layer_norm(x, weight, bias, eps);
  const auto run = compute_dtype({x, weight, bias}) == at::kDouble ? run_layer_norm<double> : run_layer_norm<float>;
  return run(x, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad, const Tensor& retained,
                                                           const std::optional<Tensor>& weight,
                                                           const std::optional<Tensor>& bias,
                                                           const std::optional<Tensor>& mean, const Tensor& rstd,
                                                           bool from_output, std::array<bool, 3> output_mask) {
  check_layer_norm_backward(grad, retained, weight, bias, mean, rstd, from_output, output_mask);
  const auto run = compute_dtype({retained, weight, bias}) == at::kDouble ? run_layer_norm_backward<double>
                                                                          : run_layer_norm_backward<float>;
  return run(grad, retained, weight, bias, mean, rstd, from_output, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("layer_norm", layer_norm_cpu);
  m.impl("layer_norm_backward", layer_norm_backward_cpu);
}

}  // namespace safe_kernels::cpu
