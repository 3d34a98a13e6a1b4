// A recipe instead of a tensor: the output of an activation remembers what it was made of, and a reader that would
// retain it retains those inputs instead, which the activation's own node retains anyway, and makes the output again in
// backward.
//
// The recipe hangs on the output itself and dies with it. In the activation's node it would not do: what a node has
// saved may be unpacked in backward only, and once (saved_tensors_hooks, activation checkpointing), and is gone when
// another reader's backward has freed it; and inputs held there beside what was saved would outlive a checkpointed
// forward. A reader saves the inputs itself, as any node saves a tensor, so that every hook and every check of versions
// applies.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <string_view>

#include "ops/activation.h"
#include "ops/gated_activation.h"

namespace safe_kernels {

struct Recipe : c10::BackendMeta {
  std::array<Tensor, 3> inputs;  // gate, up, rng_state; a plain activation has no up, and without dropout no state
  std::string kind;
  double dropout_p = 0.0;
  // As they were when the output was made: after a change in place of any of them the recipe no longer makes it.
  std::array<int64_t, 3> versions{};
  int64_t own_version = 0;
  const void* node = nullptr;  // compared, never followed
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;

  // The output has an alias that may be written to without a version of the output's telling: x.data, or numpy's.
  mutable std::atomic<bool> aliased = false;

  // Views, detached aliases and other copies of the output's metadata have no recipe; of the latter two we learn here.
  c10::intrusive_ptr<c10::BackendMeta> clone(const c10::intrusive_ptr<c10::BackendMeta>& /*self*/) const override {
    aliased = true;
    return {};
  }
};

inline c10::StorageImpl* storage_of(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// For an activation's output that has just got its node; `up` is undefined for a plain activation.
inline void attach_recipe(const Tensor& out, const Tensor& gate, const Tensor& up, std::string_view kind,
                          double dropout_p, const std::optional<Tensor>& rng_state) {
  if (out.unsafeGetTensorImpl()->get_backend_meta() != nullptr) return;  // the device's own use of it goes before ours
  auto recipe = c10::make_intrusive<Recipe>();
  recipe->inputs = {gate, up, dropout_p > 0.0 ? *rng_state : Tensor()};
  for (size_t i = 0; i < recipe->inputs.size(); ++i)
    if (recipe->inputs[i].defined()) recipe->versions[i] = recipe->inputs[i]._version();
  recipe->kind = std::string(kind);
  recipe->dropout_p = dropout_p;
  recipe->own_version = out._version();
  recipe->node = out.grad_fn().get();
  if (storage_of(out) != nullptr) recipe->storage = out.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl();
  out.unsafeGetTensorImpl()->set_backend_meta(std::move(recipe));
}

// What makes `x` again, or null: it is no activation's direct output, or it or an input has changed since, or may have.
inline const Recipe* find_recipe(const Tensor& x) {
  const auto* recipe = dynamic_cast<const Recipe*>(x.unsafeGetTensorImpl()->get_backend_meta());
  if (recipe == nullptr || x.grad_fn() == nullptr || x.grad_fn().get() != recipe->node) return nullptr;
  if (recipe->aliased || x._version() != recipe->own_version) return nullptr;
  for (size_t i = 0; i < recipe->inputs.size(); ++i)
    if (recipe->inputs[i].defined() && recipe->inputs[i]._version() != recipe->versions[i]) return nullptr;
  // Assigning to x.data changes neither version nor node.
  const auto* storage = recipe->storage.has_value() ? recipe->storage->_unsafe_get_target() : nullptr;
  return storage == storage_of(x) ? recipe : nullptr;
}

// In a backward that is recorded itself (create_graph=True) the output comes with its graph, as a retained one would.
inline Tensor follow_recipe(const Tensor& gate, const Tensor& up, const Tensor& rng_state, std::string_view kind,
                            double dropout_p) {
  const std::optional<Tensor> state = rng_state.defined() ? std::optional(rng_state) : std::nullopt;
  return up.defined() ? gated_activation(gate, up, kind, dropout_p, state) : activation(gate, kind, dropout_p, state);
}

}  // namespace safe_kernels
