// `linear_cross_entropy` in PyTorch's own products and softmax, a chunk of rows at a time: the full logits are never in
// memory. One implementation for CPUs and GPUs, since nearly all of its time is the products with the head.

#include "ops/linear_cross_entropy.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"

namespace safe_kernels::aten {

namespace {

struct Head {
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  double scaling, softcap;
};

// In float16 small probabilities would lose bits; scaling by a power of two is exact.
constexpr double kHalfBoost = 64.0;

// The losses of a chunk's rows, and the gradients for x if they are wanted.
std::tuple<Tensor, Tensor> of_chunk(const Tensor& x, const Head& head, const Tensor& target, bool wants_grad) {
  const auto dtype = x.scalar_type(), sums = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor product = at::linear(x, head.weight, head.bias), column = target.unsqueeze(-1);
  Tensor logits = product;
  if (head.scaling != 1.0 || head.softcap > 0.0) logits = product.to(sums).mul_(head.scaling);
  if (head.softcap > 0.0) logits.div_(head.softcap).tanh_().mul_(head.softcap);
  Tensor p = at::softmax(logits, -1, sums);
  // log(sum(exp(z))) = max(z) - log(max(p)), where p is the softmax; max(p) is never small.
  Tensor loss = logits.amax(-1).to(sums).sub_(p.amax(-1).log_()).sub_(logits.gather(-1, column).squeeze(-1));
  if (!wants_grad) return {loss, Tensor()};
  p.scatter_(-1, column, p.gather(-1, column).sub_(1.0));
  if (head.softcap > 0.0) p.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0));
  const double boost = dtype == at::kHalf ? kHalfBoost : 1.0;
  if (boost != 1.0) p.mul_(boost);
  Tensor grad = at::mm(dtype == sums ? p : product.copy_(p), head.weight);
  if (head.scaling != boost) grad.mul_(head.scaling / boost);
  return {loss, grad};
}

// The rows of a chunk: its logits have about `elements` numbers, and its products are wide enough to be fast.
struct Chunks {
  int64_t elements, min_rows;
  bool reads_targets;  // rows without a target are skipped, and wrong targets are errors; a GPU would have to wait

  int64_t rows(int64_t classes) const { return std::max(elements / classes, min_rows); }
};
constexpr Chunks kOnCpu{1 << 22, 32, true}, kOnGpu{1 << 26, 512, false};

// The numbers of the rows to compute.
Tensor rows_of(const Tensor& target, const Tensor& counts, int64_t ignore_index, int64_t classes,
               const Chunks& chunks) {
  if (!chunks.reads_targets) return at::arange(target.numel(), target.options());
  Tensor rows = counts.nonzero().squeeze(-1);
  const Tensor read = target.index_select(0, rows);
  const Tensor wrong = read.masked_select(read.lt(0).logical_or_(read.ge(classes)));
  TORCH_CHECK_INDEX(wrong.numel() == 0, "target must be in [0, ", classes, ") or ignore_index (", ignore_index,
                    "), got ", wrong[0].item<int64_t>());
  return rows;
}

std::tuple<Tensor, Tensor> in_chunks(const Tensor& x, const Head& head, const Tensor& target, int64_t ignore_index,
                                     const Chunks& chunks, bool wants_grad) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t count = target.numel(), classes = head.weight.size(0);
  const Tensor all = x.reshape({count, x.size(-1)}), targets = target.reshape({count});
  const Tensor counts = targets.ne(ignore_index), picked = rows_of(targets, counts, ignore_index, classes, chunks);
  Tensor loss = at::zeros({count}, x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  Tensor grad_x = wants_grad ? at::zeros({count, x.size(-1)}, x.options()) : at::empty({0}, x.options());
  for (int64_t start = 0; start < picked.size(0); start += chunks.rows(classes)) {
    const Tensor rows = picked.slice(0, start, start + chunks.rows(classes));
    // Ignored rows that are computed nevertheless get class 0, and are cleared below.
    const Tensor classes_of_rows = targets.index_select(0, rows).mul_(counts.index_select(0, rows));
    auto [losses, grads] = of_chunk(all.index_select(0, rows), head, classes_of_rows, wants_grad);
    loss.index_copy_(0, rows, losses);
    if (wants_grad) grad_x.index_copy_(0, rows, grads);
  }
  const Tensor ignored = counts.logical_not();
  loss.masked_fill_(ignored, 0.0);
  if (wants_grad) grad_x.masked_fill_(ignored.unsqueeze(-1), 0.0);
  return {loss.reshape(target.sizes()), wants_grad ? grad_x.reshape(x.sizes()) : grad_x};
}

template <const Chunks& chunks>
Tensor linear_cross_entropy_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               const Tensor& target, int64_t ignore_index, double scaling, double softcap) {
  check_linear_cross_entropy(x, weight, bias, target, ignore_index, scaling, softcap);
  const Head head{weight, bias, scaling, softcap};
  return std::get<0>(in_chunks(x, head, target, ignore_index, chunks, /*wants_grad=*/false));
}

template <const Chunks& chunks>
std::tuple<Tensor, Tensor> linear_cross_entropy_backward_of(const Tensor& x, const Tensor& weight,
                                                            const std::optional<Tensor>& bias, const Tensor& target,
                                                            int64_t ignore_index, double scaling, double softcap) {
  check_linear_cross_entropy(x, weight, bias, target, ignore_index, scaling, softcap);
  return in_chunks(x, {weight, bias, scaling, softcap}, target, ignore_index, chunks, /*wants_grad=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(safe_kernels, CPU, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_of<kOnCpu>);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_of<kOnCpu>);
}

TORCH_LIBRARY_IMPL(safe_kernels, CUDA, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_of<kOnGpu>);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_of<kOnGpu>);
}

}  // namespace safe_kernels::aten
