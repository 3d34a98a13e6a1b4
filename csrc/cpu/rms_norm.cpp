#include "ops/rms_norm.h"

#include <torch/library.h>

#include "cpu/norm_rows.h"

namespace safe_kernels::cpu {

namespace {

SAFE_KERNELS_VARIANTS(forward_rows, forward_body<Rms<float>>, NormForward<Rms<float>>)
SAFE_KERNELS_VARIANTS(forward_rows, forward_body<Rms<double>>, NormForward<Rms<double>>)
SAFE_KERNELS_VARIANTS(backward_chunks, backward_body<Rms<float>>, NormBackward<Rms<float>>)
SAFE_KERNELS_VARIANTS(backward_chunks, backward_body<Rms<double>>, NormBackward<Rms<double>>)

Tensor scale_of(const Tensor& weight, double weight_offset, at::ScalarType dtype) {
  const Tensor scale = weight.to(dtype);
  return weight_offset == 0.0 ? scale.contiguous() : scale.add(weight_offset).contiguous();
}

template <typename T>
std::tuple<Tensor, Tensor> run_rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor out = empty_like_x(x, true), rstd = empty_per_row(x, dtype);
  const Tensor scale = scale_of(weight, weight_offset, dtype);
  const NormForward<Rms<T>> args{
      Rows(x), Rows(out), scale.const_data_ptr<T>(), nullptr, static_cast<T>(eps), nullptr, rstd.mutable_data_ptr<T>()};
  at::parallel_for(0, args.x.count, 32, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
  return {out, rstd};
}

template <typename T>
std::tuple<Tensor, Tensor> run_rms_norm_backward(const Tensor& grad, const Tensor& retained, const Tensor& weight,
                                                 const Tensor& rstd, double weight_offset, bool from_output,
                                                 const std::array<bool, 2>& wanted) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor scale = scale_of(weight, weight_offset, dtype), row_rstd = rstd.to(dtype).contiguous();
  const Tensor inverse = from_output ? scale.reciprocal() : Tensor();
  const Tensor grad_x = empty_like_x(retained, wanted[0]);
  NormBackward<Rms<T>> args{};
  args.grad = Rows(grad);
  args.retained = Rows(retained);
  if (wanted[0]) args.grad_x = Rows(grad_x);
  args.scale = scale.const_data_ptr<T>();
  args.inverse = from_output ? inverse.const_data_ptr<T>() : nullptr;
  args.rstd = row_rstd.const_data_ptr<T>();
  const Chunks chunks(args.grad.count);
  args.chunk_rows = chunks.rows;
  const Tensor partial = at::empty({wanted[1] ? chunks.count : 0, weight.size(0)}, scale.options());
  args.grad_weight = wanted[1] ? partial.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) { backward_chunks(args, begin, end); });
  return {grad_x, sum_of_chunks(partial, wanted[1], weight.options())};
}

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                        bool /*retain_output*/) {
  check_rms_norm(x, weight, eps);
  const auto run = compute_dtype({x, weight}) == at::kDouble ? run_rms_norm<double> : run_rms_norm<float>;
  return run(x, weight, eps, weight_offset);
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad, const Tensor& retained, const Tensor& weight,
                                                 const Tensor& rstd, double weight_offset, bool from_output,
                                                 std::array<bool, 2> output_mask) {
  check_rms_norm_backward(grad, retained, weight, rstd, weight_offset, from_output, output_mask);
  const auto run =
      compute_dtype({retained, weight}) == at::kDouble ? run_rms_norm_backward<double> : run_rms_norm_backward<float>;
  return run(grad, retained, weight, rstd, weight_offset, from_output, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("rms_norm_backward", rms_norm_backward_cpu);
}

}  // namespace safe_kernels::cpu
