// For the gradients of lora_A and lora_B an adapter with input x retains the first of these that applies:
//   x is the output of an activation    the activation's inputs, which the activation retains anyway
//   only lora_B trains                  h = dropout(x) A', r numbers per row
//   dropout, and x is a slice of a larger tensor    a copy; PEFT keeps only the dropped copy and its mask
//   lora_A reads x in a narrower dtype with PEFT, and no norm keeps x    one copy in that dtype; PEFT: one per reader
//   otherwise                           x itself, shared with every other reader

#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/ops/equal.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd/norm_output.h"
#include "autograd/recipe.h"
#include "ops/lora.h"

namespace safe_kernels {

// The dtype in which PEFT's lora_A reads its input: autocast's if that is on (it leaves float64 alone, and some devices
// have none, such as meta), otherwise the adapter's, to which PEFT casts x.
inline at::ScalarType dtype_that_peft_reads(const Tensor& lora_A) {
  const auto device = lora_A.device().type();
  const bool is_cast = lora_A.scalar_type() != at::kDouble && at::autocast::is_autocast_available(device) &&
                       at::autocast::is_autocast_enabled(device);
  return is_cast ? at::autocast::get_autocast_dtype(device) : lora_A.scalar_type();
}

// h, in the dtype in which PEFT's lora_B would keep it.
inline Tensor make_hidden(const Tensor& x, const Tensor& lora_A, double dropout_p,
                          const std::optional<Tensor>& rng_state) {
  const auto rank = lora_A.sym_size(0);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = rank;
  const Tensor base = x.new_zeros_symint(sizes, x.options().dtype(dtype_that_peft_reads(lora_A)));
  const Tensor identity = at::diag_embed(lora_A.new_ones_symint({rank}));
  return std::get<0>(lora(x, base, lora_A, identity, 1.0, dropout_p, rng_state, std::nullopt, 0, std::nullopt));
}

// The gradient of lora_B from h, computed as for an adapter with input h and the identity as lora_A.
inline Tensor grad_of_B(const Tensor& grad, const Tensor& h, const Tensor& lora_A, const Tensor& lora_B,
                        double scaling) {
  const Tensor identity = at::diag_embed(lora_A.new_ones_symint({lora_A.sym_size(0)}));
  return std::get<2>(lora_backward(grad, h, identity, lora_B, scaling, 0.0, std::nullopt, {false, false, true}));
}

// Whether x's storage is larger than PEFT's dropped copy and its mask (one byte per element).
inline bool exceeds_dropped_copy(const Tensor& x) {
  if (storage_of(x) == nullptr || x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  const auto bytes = storage_of(x)->sym_nbytes().maybe_as_int();
  const int64_t element = static_cast<int64_t>(x.element_size()) + (x.requires_grad() ? 1 : 0);
  return bytes.has_value() && *bytes > x.numel() * element;
}

// All readers of x share this copy. It holds the storage weakly: saved-tensor hooks decide how long it lives.
struct CastCopy : Note {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::vector<int64_t> strides;
  at::ScalarType dtype;
  int64_t version;

  CastCopy(const Tensor& copy, int64_t version)
      : storage(copy.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl()),
        strides(copy.strides().vec()),
        dtype(copy.scalar_type()),
        version(version) {}

  // Undefined if no reader keeps the copy, or x has changed since.
  Tensor of(const Tensor& x, at::ScalarType wanted) const {
    if (wanted != dtype || version != x._version() || aliases != 0) return {};
    auto alive = storage.lock();
    if (!alive || alive->nbytes() == 0) return {};
    const auto copy =
        at::empty({0}, x.options().dtype(dtype)).set_(c10::Storage(std::move(alive)), 0, x.sizes(), strides);
    // An older alias, such as a NumPy array, may have been written to. Comparing on another device would wait for it.
    const bool has_values = x.is_cpu() && !x.key_set().has(c10::DispatchKey::Python);
    return has_values && !at::equal(copy, x.to(dtype)) ? Tensor() : copy;
  }
};

// Undefined if x itself must be saved.
inline Tensor find_cast_copy(const Tensor& x, at::ScalarType dtype) {
  if (x.is_inference() || c10::elementSize(dtype) >= static_cast<size_t>(x.element_size())) return {};
  if (is_traced()) return x.to(dtype);  // the compiler merges equal copies
  if (const auto* note = find_note<CastCopy>(x)) {
    if (const Tensor copy = note->of(x, dtype); copy.defined()) return copy;
    x.unsafeGetTensorImpl()->set_backend_meta(nullptr);
  }
  const bool has_memory = storage_of(x) != nullptr && !x.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  if (has_memory && x.unsafeGetTensorImpl()->get_backend_meta() != nullptr) return {};  // the note's slot is taken
  const Tensor copy = x.to(dtype);
  if (has_memory) attach_note(x, c10::make_intrusive<CastCopy>(copy, x._version()));
  return copy;
}

// Saves x, or the tensors in its place, into saved[0] or at the end of `saved`.
inline void keep_adapter_input(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list& saved,
                               const Tensor& x, const Tensor& lora_A, bool only_B, double dropout_p,
                               const std::optional<Tensor>& rng_state, bool may_cast) {
  if (const Recipe* recipe = find_recipe(x)) {
    saved.insert(saved.end(), recipe->inputs.begin(), recipe->inputs.end());
    ctx->saved_data["recipe_kind"] = recipe->kind;
    ctx->saved_data["recipe_dropout_p"] = recipe->dropout_p;
  } else if (only_B) {
    saved[0] = make_hidden(x, lora_A, dropout_p, rng_state);
    ctx->saved_data["is_hidden"] = true;
  } else if (dropout_p > 0.0 && exceeds_dropped_copy(x)) {
    saved[0] = x.clone(at::MemoryFormat::Contiguous);
  } else {
    const bool is_kept = announce_reader(x);
    saved[0] = may_cast && !is_kept ? find_cast_copy(x, dtype_that_peft_reads(lora_A)) : Tensor();
    if (!saved[0].defined()) saved[0] = x;
  }
}

inline bool keeps_hidden(const torch::autograd::AutogradContext* ctx) {
  return ctx->saved_data.count("is_hidden") != 0;
}

// x from the saved tensors (`count` of them without a recipe); undefined if x is not kept.
inline Tensor adapter_input(const torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& saved,
                            size_t count) {
  if (keeps_hidden(ctx)) return {};
  if (saved.size() == count) return saved[0];
  return follow_recipe(saved[count], saved[count + 1], saved[count + 2],
                       ctx->saved_data.at("recipe_kind").toStringRef(),
                       ctx->saved_data.at("recipe_dropout_p").toDouble());
}

}  // namespace safe_kernels
