// LoRA on a CPU: one sweep over the rows forward and one backward. A block of rows of x is read, dropped out and
// converted once, while it is in cache, for every product that needs it; nothing of size [N, d] is made besides the
// results.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/cka.h"
#include "cpu/dropout.h"
#include "cpu/lora_sweeps.h"
#include "cpu/rows.h"
#include "ops/lora.h"

namespace safe_kernels::cpu {

namespace {

SAFE_KERNELS_VARIANTS(forward_rows, lora_forward_body<float>, LoraForwardArgs<float>)
SAFE_KERNELS_VARIANTS(forward_rows, lora_forward_body<double>, LoraForwardArgs<double>)
SAFE_KERNELS_VARIANTS(backward_chunks, lora_backward_body<float>, LoraBackwardArgs<float>)
SAFE_KERNELS_VARIANTS(backward_chunks, lora_backward_body<double>, LoraBackwardArgs<double>)
SAFE_KERNELS_VARIANTS(score_blocks, cka_blocks<float>, CkaArgs<float>)
SAFE_KERNELS_VARIANTS(score_blocks, cka_blocks<double>, CkaArgs<double>)

// A copy of a [rows, r] matrix whose rows are filled up with zeros to whole vectors.
Tensor padded(const Tensor& matrix, at::ScalarType dtype) {
  const int64_t r = matrix.size(1), stride = (r + 7) / 8 * 8;
  if (r == stride) return matrix.to(dtype).contiguous();
  Tensor result = at::zeros({matrix.size(0), stride}, matrix.options().dtype(dtype));
  result.narrow(1, 0, r).copy_(matrix);
  return result;
}

// Two matrices of so many rows squared, in double, are 1 GiB a thread.
constexpr int64_t kMostBlockRows = 8192;

template <typename T>
Tensor score(const Rows& base, const Tensor& h, const Tensor& lora_B, int64_t r, const Tensor& block_starts,
             int64_t block_rows, const std::optional<Tensor>& row_weight) {
  const Tensor starts = block_starts.contiguous();
  const int64_t count = starts.numel();
  const int64_t* first = starts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_VALUE(first[i] >= 0 && first[i] < std::max<int64_t>(base.count, 1), "block_starts[", i,
                      "] must be a row of x, 0 to ", base.count - 1, ", got ", first[i]);
  TORCH_CHECK_VALUE(std::min(block_rows, base.count) <= kMostBlockRows, "block_rows must be at most ", kMostBlockRows,
                    ", since a block takes two matrices of its rows squared, got ", block_rows);
  Tensor counts;
  if (row_weight.has_value() && row_weight->defined()) counts = row_weight->ne(0).contiguous();
  std::vector<Sums> sums(count);
  const CkaArgs<T> args{base,       h.const_data_ptr<T>(),
                        h.size(1),  lora_B.const_data_ptr<T>(),
                        r,          first,
                        block_rows, counts.defined() ? counts.const_data_ptr<bool>() : nullptr,
                        sums.data()};
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { score_blocks(args, begin, end); });
  Tensor result = at::zeros({4}, h.options().dtype(at::kDouble));
  double* total = result.mutable_data_ptr<double>();
  for (const Sums& block : sums) {
    total[0] += block.a;
    total[1] += block.b;
    total[2] += block.c;
    total[3] += block.rows;
  }
  return result;
}

template <typename T>
std::tuple<Tensor, Tensor> run_lora(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B,
                                    double scaling, const Dropout& dropout, const std::optional<Tensor>& block_starts,
                                    int64_t block_rows, const std::optional<Tensor>& row_weight) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const bool scores = block_starts.has_value() && block_starts->defined();
  const Tensor At = padded(lora_A.t(), dtype), Bt = lora_B.to(dtype).t().contiguous();
  const Tensor out = at::empty(base.sizes(), base.options().memory_format(at::MemoryFormat::Contiguous));
  LoraForwardArgs<T> args{Rows(x),
                          Rows(base),
                          Rows(out),
                          At.const_data_ptr<T>(),
                          Bt.const_data_ptr<T>(),
                          lora_A.size(0),
                          At.size(1),
                          static_cast<T>(scaling),
                          dropout,
                          nullptr};
  Tensor h;
  if (scores) {
    h = at::empty({args.x.count, args.stride}, At.options());
    args.h = h.mutable_data_ptr<T>();
  }
  // Rows without features are not walked: there may be any number of them.
  const int64_t rows = scores || out.numel() > 0 ? args.x.count : 0;
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
  if (!scores) return {out, at::empty({0}, x.options().dtype(at::kDouble))};
  return {out, score<T>(args.base, h, padded(lora_B, dtype), args.r, *block_starts, block_rows, row_weight)};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run_lora_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                     const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                     const Dropout& dropout, const std::array<bool, 3>& wanted) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const bool has_x = x.has_value() && x->defined();
  const int64_t r = lora_A.size(0), d_in = lora_A.size(1), d_out = lora_B.size(0);
  const auto options = lora_A.options().dtype(dtype);
  const Tensor A = lora_A.to(dtype).contiguous(), B = padded(lora_B, dtype);
  const Tensor At = wanted[2] ? padded(lora_A.t(), dtype) : Tensor();
  auto shape = grad.sizes().vec();
  shape.back() = d_in;
  const Tensor grad_x = at::empty(wanted[0] ? at::IntArrayRef(shape) : at::IntArrayRef({0}),
                                  (has_x ? *x : grad).options().memory_format(at::MemoryFormat::Contiguous));
  LoraBackwardArgs<T> args;
  args.grad = Rows(grad);
  if (has_x) args.x = Rows(*x);
  if (wanted[0]) args.grad_x = Rows(grad_x);
  args.d_in = d_in;
  args.lora_A = A.const_data_ptr<T>();
  args.lora_At = wanted[2] ? At.const_data_ptr<T>() : nullptr;
  args.lora_B = B.const_data_ptr<T>();
  args.r = r;
  args.stride = B.size(1);
  args.scaling = static_cast<T>(scaling);
  args.dropout = dropout;
  args.chunk_rows = std::max<int64_t>(128, (args.grad.count + 31) / 32);
  const bool empty = d_in == 0 || d_out == 0;
  const int64_t chunks = empty ? 0 : (args.grad.count + args.chunk_rows - 1) / args.chunk_rows;
  const Tensor partial_A = at::empty({wanted[1] ? chunks : 0, r, d_in}, options);
  const Tensor partial_B = at::empty({wanted[2] ? chunks : 0, r, d_out}, options);
  args.grad_A = wanted[1] ? partial_A.mutable_data_ptr<T>() : nullptr;
  args.grad_Bt = wanted[2] ? partial_B.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { backward_chunks(args, begin, end); });
  if (empty) grad_x.zero_();
  Tensor grad_A = at::empty({0}, lora_A.options()), grad_B = at::empty({0}, lora_B.options());
  if (wanted[1]) grad_A = partial_A.sum(0).to(lora_A.scalar_type());
  if (wanted[2]) grad_B = partial_B.sum(0).t().to(lora_B.scalar_type()).contiguous();
  return {grad_x, grad_A, grad_B};
}

std::tuple<Tensor, Tensor> lora_cpu(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B,
                                    double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                                    const std::optional<Tensor>& block_starts, int64_t block_rows,
                                    const std::optional<Tensor>& row_weight) {
  check_lora(x, base, lora_A, lora_B, dropout_p, rng_state, block_starts, block_rows, row_weight);
  const auto run = compute_dtype({x, base, lora_A, lora_B}) == at::kDouble ? run_lora<double> : run_lora<float>;
  return run(x, base, lora_A, lora_B, scaling, make_dropout(dropout_p, rng_state), block_starts, block_rows,
             row_weight);
}

std::tuple<Tensor, Tensor, Tensor> lora_backward_cpu(const Tensor& grad, const std::optional<Tensor>& x,
                                                     const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                     double dropout_p, const std::optional<Tensor>& rng_state,
                                                     std::array<bool, 3> output_mask) {
  check_lora_backward(grad, x, lora_A, lora_B, scaling, dropout_p, rng_state, output_mask);
  const auto run =
      compute_dtype({grad, x, lora_A, lora_B}) == at::kDouble ? run_lora_backward<double> : run_lora_backward<float>;
  return run(grad, x, lora_A, lora_B, scaling, make_dropout(dropout_p, rng_state), output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("lora", lora_cpu);
  m.impl("lora_backward", lora_backward_cpu);
}

}  // namespace safe_kernels::cpu
