// A norm keeps its input, as PyTorch's does, until a reader of its output keeps that output anyway: then backward is
// made from the output, and the norm lets go of its input. So it never keeps more than PyTorch's: several norms of one
// tensor keep it once, and an output that only the user has may be written to in place.

#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <mutex>
#include <utility>
#include <vector>

#include "autograd/note.h"
#include "autograd/saved.h"
#include "readable.h"

namespace safe_kernels {

inline constexpr char PARAMETERS[] = "parameters";

// Of the weight, and the bias where there is one: what a norm saves between its first tensor and its statistics.
inline std::optional<int64_t> fingerprint_of(const torch::autograd::variable_list& saved, size_t end) {
  int64_t sum = 0;
  for (size_t i = 1; i < end; ++i) {
    const auto part = fingerprint(saved[i]);
    if (!part.has_value()) return std::nullopt;
    sum = sum * 31 + *part;
  }
  return sum;
}

// For backward to compare: a write through .data counts no version.
inline void note_parameters(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& saved,
                            size_t end) {
  const auto values = fingerprint_of(saved, end);
  if (values.has_value()) ctx->saved_data[PARAMETERS] = *values;
}

// To be called where backward needs the parameters of the forward: from the output it divides by the weight that made
// that, for instance.
inline void check_parameters(const torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& saved,
                             size_t end) {
  const auto found = ctx->saved_data.find(PARAMETERS);
  if (found == ctx->saved_data.end()) return;
  const auto now = fingerprint_of(saved, end);
  TORCH_CHECK(!now.has_value() || *now == found->second.toInt(),
              "the weight or bias of a bound norm (safe_kernels) was changed between forward and backward, through "
              ".data for instance, and backward needs the values of the forward. ",
              "Call backward before the change, or leave norms as they are: safe_peft.bind(model, parts=...) without "
              "\"norms\".");
}

struct NormOutput : OutputNote {
  using OutputNote::OutputNote;

  // `saved` is what the node has saved: the input, weight and bias, mean and rstd. The mean, where it has one, is of no
  // use with the output.
  template <class Function>
  void set(torch::autograd::variable_list saved, bool is_invertible, size_t mean_at, size_t rstd_at) {
    saved_ = std::move(saved);
    for (const Tensor& tensor : saved_) versions_.push_back(tensor.defined() ? tensor._version() : 0);
    is_invertible_ = is_invertible;
    hooks_ = current_hooks();
    mean_at_ = mean_at;
    rstd_at_ = rstd_at;
    save_ = [](torch::autograd::Node& node, torch::autograd::variable_list&& again) {
      auto& own = dynamic_cast<torch::autograd::CppNode<Function>&>(node);
      own.ctx_.save_for_backward(std::move(again));
      own.save_variables_to_ctx();
    };
  }

  // Called by a reader that is about to save `out`. Activation checkpointing counts the tensors that are saved, and
  // they must be as many when it runs the forward again. So the first reader has the node save as many as before,
  // whether they are made of the input or of the output. A reader under other hooks than the norm's changes nothing: it
  // is in another checkpointed part of the model, which finds no note on its input when it runs again.
  // Returns whether the node keeps it now.
  bool keep(const Tensor& out) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (current_hooks() != hooks_) return false;
    if (saved_.empty() || out.grad_fn() == nullptr || out.grad_fn().get() != node) return is_kept_;
    for (size_t i = 0; i < saved_.size(); ++i)
      if (saved_[i].defined() && saved_[i]._version() != versions_[i]) return false;
    if (is_invertible_ && is_unchanged(out)) {
      is_kept_ = true;
      saved_[0] = out;
      saved_[rstd_at_] = saved_[rstd_at_].unsqueeze(0);
      if (saved_[mean_at_].defined()) saved_[mean_at_] = saved_[rstd_at_];
    }
    save_(*out.grad_fn(), std::exchange(saved_, {}));
    return is_kept_;
  }

  // The output has left the part of the model that saves under `hook`: a reader that comes now is outside of it.
  // The current hooks have to live as long as the node: see safe_peft/binding/blocks/recompute.py.
  void leave(const void* hook) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (hooks_ == hook) hooks_ = current_hooks();
  }

 private:
  // The unpacking hook lives as long as what was saved with it, so no other has its address.
  static const void* current_hooks() {
    const auto hooks = at::SavedTensorDefaultHooks::get_hooks();
    return hooks.has_value() ? hooks->second.ptr(&hooks->second.pyinterpreter()) : nullptr;
  }

  std::mutex mutex_;
  torch::autograd::variable_list saved_;  // empty once a reader has come
  std::vector<int64_t> versions_;
  bool is_invertible_ = false, is_kept_ = false;
  const void* hooks_ = nullptr;
  size_t mean_at_ = 0, rstd_at_ = 0;
  void (*save_)(torch::autograd::Node&, torch::autograd::variable_list&&) = nullptr;
};

// For a norm's output that has just got its node: see `NormOutput::set`.
template <class Function>
void attach_norm_output(const Tensor& out, torch::autograd::variable_list saved, bool is_invertible, size_t mean_at,
                        size_t rstd_at) {
  auto note = c10::make_intrusive<NormOutput>(out);
  note->template set<Function>(std::move(saved), is_invertible, mean_at, rstd_at);
  attach_note(out, std::move(note));
}

// Whether a node's saved tensors begin with its output. They say so themselves, by the shape of rstd: where a forward
// runs again, a second node saves what the first one's backward is made of.
inline bool is_from_output(const Tensor& saved, const Tensor& rstd) { return rstd.dim() == saved.dim(); }

// To be called before x is saved for a backward: x may be the output of a norm, or a view of all of it, which FSDP2 and
// other hooks of a module hand on. Returns whether the norm keeps it too.
inline bool announce_reader(const Tensor& x) {
  if (auto* note = find_note<NormOutput>(x)) return note->keep(x);
  if (!x.is_view() || x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  const Tensor base(x._base());
  auto* note = find_note<NormOutput>(base);
  return note != nullptr && x.numel() == base.numel() && note->keep(base);
}

inline void leave_hooks(const Tensor& out, const void* hook) {
  if (auto* note = find_note<NormOutput>(out)) note->leave(hook);
}

}  // namespace safe_kernels
