// A norm keeps its input, like PyTorch's, until a reader of its output keeps that output. Then backward uses the
// output, and the norm drops its input. So it never keeps more than PyTorch's: several norms of one tensor keep it
// once, and the user may write in place to an output that nothing else reads.

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

// Of the weight and the bias, if any: a norm saves them between its first tensor and its statistics.
inline std::optional<int64_t> fingerprint_of(const torch::autograd::variable_list& saved, size_t end) {
  int64_t sum = 0;
  for (size_t i = 1; i < end; ++i) {
    const auto part = fingerprint(saved[i]);
    if (!part.has_value()) return std::nullopt;
    sum = sum * 31 + *part;
  }
  return sum;
}

// For check_parameters: a write through .data does not change the version counter.
inline void note_parameters(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& saved,
                            size_t end) {
  const auto values = fingerprint_of(saved, end);
  if (values.has_value()) ctx->saved_data[PARAMETERS] = *values;
}

// Called if backward needs forward's parameters, for instance to divide the output by the weight.
inline void check_parameters(const torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& saved,
                             size_t end) {
  const auto found = ctx->saved_data.find(PARAMETERS);
  if (found == ctx->saved_data.end()) return;
  const auto now = fingerprint_of(saved, end);
  TORCH_CHECK(!now.has_value() || *now == found->second.toInt(),
              "the weight or bias of a bound norm (safe_kernels) was changed between forward and backward, through "
              ".data for instance, but backward needs the values of forward. ",
              "Call backward before the change, or leave norms as they are: safe_peft.bind(model, parts=...) without "
              "\"norms\".");
}

struct NormOutput : OutputNote {
  using OutputNote::OutputNote;

  // `saved` are the node's saved tensors: the input, weight and bias, mean and rstd. Backward from the output does not
  // need the mean.
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

  // A reader calls this before it saves `out`. Activation checkpointing requires the same number of saved tensors when
  // it runs forward again. So at the first reader the node saves as many tensors as before, from the input or from the
  // output. A reader under other hooks than the norm's changes nothing: it belongs to another checkpointed part of the
  // model, and finds no note on its input when that part runs again.
  // Returns whether the node keeps `out` now.
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

  // The output has left the part of the model that saves under `hook`; later readers are outside of it.
  // The current hooks must live as long as the node: see safe_peft/binding/blocks/recompute.py.
  void leave(const void* hook) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (hooks_ == hook) hooks_ = current_hooks();
  }

 private:
  // The unpacking hook lives as long as the tensors saved with it, so its address is unique.
  static const void* current_hooks() {
    const auto hooks = at::SavedTensorDefaultHooks::get_hooks();
    return hooks.has_value() ? hooks->second.ptr(&hooks->second.pyinterpreter()) : nullptr;
  }

  std::mutex mutex_;
  torch::autograd::variable_list saved_;  // empty after the first reader
  std::vector<int64_t> versions_;
  bool is_invertible_ = false, is_kept_ = false;
  const void* hooks_ = nullptr;
  size_t mean_at_ = 0, rstd_at_ = 0;
  void (*save_)(torch::autograd::Node&, torch::autograd::variable_list&&) = nullptr;
};

// Called directly after a norm's output gets its node: see `NormOutput::set`.
template <class Function>
void attach_norm_output(const Tensor& out, torch::autograd::variable_list saved, bool is_invertible, size_t mean_at,
                        size_t rstd_at) {
  auto note = c10::make_intrusive<NormOutput>(out);
  note->template set<Function>(std::move(saved), is_invertible, mean_at, rstd_at);
  attach_note(out, std::move(note));
}

// Whether a node's saved tensors begin with its output. The shape of rstd shows it, because with activation
// checkpointing a second forward's node saves the tensors for the first node's backward.
inline bool is_from_output(const Tensor& saved, const Tensor& rstd) { return rstd.dim() == saved.dim(); }

// FSDP2 passes the inputs of a unit through a node of its own, which makes them views of themselves.
inline bool is_passed_by_fsdp(const Tensor& x) {
  if (!x.is_view() || x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  return x.grad_fn() != nullptr && x.grad_fn()->name() == "RegisterPostBackwardFunctionBackward";
}

// Called before x is saved for a backward. Returns whether x is the output of a norm, and the norm keeps it too. Other
// views of an output do not count: a write through the view's .data would not be noticed.
inline bool announce_reader(const Tensor& x) {
  if (auto* note = find_note<NormOutput>(x)) return note->keep(x);
  if (!is_passed_by_fsdp(x)) return false;
  const Tensor base(x._base());
  auto* note = find_note<NormOutput>(base);
  return note != nullptr && x.numel() == base.numel() && note->keep(base);
}

inline void leave_hooks(const Tensor& out, const void* hook) {
  if (auto* note = find_note<NormOutput>(out)) note->leave(hook);
}

}  // namespace safe_kernels
