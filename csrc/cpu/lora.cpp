// LoRA on a CPU: see lora_sweeps.h.

#include <ATen/Dispatch.h>
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

SAFE_KERNELS_REAL_VARIANTS(forward_rows, lora_forward_body, LoraForwardArgs)
SAFE_KERNELS_REAL_VARIANTS(backward_chunks, lora_backward_body, LoraBackwardArgs)
SAFE_KERNELS_REAL_VARIANTS(score_blocks, cka_blocks, CkaArgs)

// A block needs two [rows, rows] matrices in double: 1 GiB per thread at this limit.
constexpr int64_t kMostBlockRows = 8192;

std::tuple<Tensor, Tensor> lora_cpu(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B,
                                    double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                                    const std::optional<Tensor>& block_starts, int64_t block_rows,
                                    const std::optional<Tensor>& row_weight) {
  check_lora(x, base, lora_A, lora_B, scaling, dropout_p, rng_state, block_starts, block_rows, row_weight);
  const auto dtype = compute_dtype({x, base, lora_A, lora_B});
  const bool scores = given(block_starts);
  const Tensor At = padded(lora_A.t(), dtype), Bt = lora_B.to(dtype).t().contiguous(), out = empty_like_rows(base);
  const Rows x_rows(x), base_rows(base);
  const Tensor h = at::empty({scores ? x_rows.count : 0, At.size(1)}, At.options());
  // Rows without features are skipped: there may be any number of them.
  const int64_t rows = scores || out.numel() > 0 ? x_rows.count : 0;
  Tensor statistics = at::empty({0}, x.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(dtype, "lora", [&] {
    const LoraForwardArgs<scalar_t> args{x_rows,
                                         base_rows,
                                         Rows(out),
                                         At.const_data_ptr<scalar_t>(),
                                         Bt.const_data_ptr<scalar_t>(),
                                         lora_A.size(0),
                                         At.size(1),
                                         static_cast<scalar_t>(scaling),
                                         make_dropout(dropout_p, rng_state),
                                         scores ? h.mutable_data_ptr<scalar_t>() : nullptr};
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) { forward_rows(args, begin, end); });
  });
  if (scores)
    statistics = score(base_rows, h, padded(lora_B, dtype), lora_A.size(0), *block_starts, block_rows, row_weight);
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> lora_backward_cpu(const Tensor& grad, const std::optional<Tensor>& x,
                                                     const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                     double dropout_p, const std::optional<Tensor>& rng_state,
                                                     std::array<bool, 3> output_mask) {
  check_lora_backward(grad, x, lora_A, lora_B, scaling, dropout_p, rng_state, output_mask);
  const bool wants_x = output_mask[0], wants_A = output_mask[1], wants_B = output_mask[2];
  const auto dtype = compute_dtype({grad, x, lora_A, lora_B});
  const int64_t r = lora_A.size(0), d_in = lora_A.size(1), d_out = lora_B.size(0);
  const Tensor A = lora_A.to(dtype).contiguous(), B = padded(lora_B, dtype);
  const Tensor At = wants_B ? padded(lora_A.t(), dtype) : Tensor();
  auto shape = grad.sizes().vec();
  shape.back() = d_in;
  const Tensor grad_x = at::empty(wants_x ? at::IntArrayRef(shape) : at::IntArrayRef({0}),
                                  (given(x) ? *x : grad).options().memory_format(at::MemoryFormat::Contiguous));
  const Rows grads(grad);
  const bool empty = d_in == 0 || d_out == 0;
  const int64_t chunk_rows = std::max<int64_t>(128, (grads.count + 31) / 32);
  const int64_t chunks = empty ? 0 : (grads.count + chunk_rows - 1) / chunk_rows;
  const Tensor partial_A = at::empty({wants_A ? chunks : 0, r, d_in}, A.options());
  const Tensor partial_B = at::empty({wants_B ? chunks : 0, r, d_out}, A.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "lora_backward", [&] {
    const LoraBackwardArgs<scalar_t> args{grads,
                                          given(x) ? Rows(*x) : Rows(),
                                          wants_x ? Rows(grad_x) : Rows(),
                                          A.const_data_ptr<scalar_t>(),
                                          wants_B ? At.const_data_ptr<scalar_t>() : nullptr,
                                          B.const_data_ptr<scalar_t>(),
                                          d_in,
                                          r,
                                          B.size(1),
                                          static_cast<scalar_t>(scaling),
                                          make_dropout(dropout_p, rng_state),
                                          wants_A ? partial_A.mutable_data_ptr<scalar_t>() : nullptr,
                                          wants_B ? partial_B.mutable_data_ptr<scalar_t>() : nullptr,
                                          chunk_rows};
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { backward_chunks(args, begin, end); });
  });
  if (empty) grad_x.zero_();
  Tensor grad_A = at::empty({0}, lora_A.options()), grad_B = at::empty({0}, lora_B.options());
  if (wants_A) grad_A = partial_A.sum(0).to(lora_A.scalar_type());
  if (wants_B) grad_B = partial_B.sum(0).t().to(lora_B.scalar_type()).contiguous();
  return {grad_x, grad_A, grad_B};
}

}  // namespace

Tensor padded(const Tensor& matrix, at::ScalarType dtype, int64_t more) {
  const int64_t r = matrix.size(1), stride = (r + 7) / 8 * 8 + more;
  if (r == stride) return matrix.to(dtype).contiguous();
  Tensor result = at::zeros({matrix.size(0), stride}, matrix.options().dtype(dtype));
  result.narrow(1, 0, r).copy_(matrix);
  return result;
}

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
  if (given(row_weight)) counts = row_weight->ne(0).contiguous();
  std::vector<Sums> sums(count);
  AT_DISPATCH_FLOATING_TYPES(h.scalar_type(), "score", [&] {
    const CkaArgs<scalar_t> args{base,       h.const_data_ptr<scalar_t>(),
                                 h.size(1),  lora_B.const_data_ptr<scalar_t>(),
                                 r,          first,
                                 block_rows, counts.defined() ? counts.const_data_ptr<bool>() : nullptr,
                                 sums.data()};
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { score_blocks(args, begin, end); });
  });
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

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("lora", lora_cpu);
  m.impl("lora_backward", lora_backward_cpu);
}

}  // namespace safe_kernels::cpu
