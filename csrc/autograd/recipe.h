// A recipe instead of a tensor: the output of an activation remembers what it was made of, and a reader that would
// retain it retains those inputs instead, which the activation's own node retains anyway, and makes the output again in
// backward.
//
// The recipe hangs on the output itself and dies with it. In the activation's node it would not do: what a node has
// saved may be unpacked in backward only, and once (saved_tensors_hooks, activation checkpointing), and is gone when
// another reader's backward has freed it; and inputs held there in addition to what was saved would outlive a
// checkpointed forward. A reader saves the inputs itself, as any node saves a tensor, so that every hook and every
// check of versions applies.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "autograd/note.h"
#include "ops/activation.h"
#include "ops/gated_activation.h"

namespace safe_kernels {

struct Recipe : OutputNote {
  using OutputNote::OutputNote;

  std::array<Tensor, 3> inputs;  // gate, up, rng_state; a plain activation has no up, and without dropout no state
  std::string kind;
  double dropout_p = 0.0;
  // As they were when the output was made: after a change in place of any of them the recipe no longer makes it.
  std::array<int64_t, 3> versions{};
};

// For an activation's output that has just got its node; `up` is undefined for a plain activation.
inline void attach_recipe(const Tensor& out, const Tensor& gate, const Tensor& up, std::string_view kind,
                          double dropout_p, const std::optional<Tensor>& rng_state) {
  auto recipe = c10::make_intrusive<Recipe>(out);
  recipe->inputs = {gate, up, dropout_p > 0.0 ? *rng_state : Tensor()};
  for (size_t i = 0; i < recipe->inputs.size(); ++i)
    if (recipe->inputs[i].defined()) recipe->versions[i] = recipe->inputs[i]._version();
  recipe->kind = std::string(kind);
  recipe->dropout_p = dropout_p;
  attach_note(out, std::move(recipe));
}

// What makes `x` again, or null: it is no activation's direct output, or it or an input has changed since, or may have.
inline const Recipe* find_recipe(const Tensor& x) {
  const auto* recipe = find_note<Recipe>(x);
  if (recipe == nullptr || !recipe->is_unchanged(x)) return nullptr;
  for (size_t i = 0; i < recipe->inputs.size(); ++i)
    if (recipe->inputs[i].defined() && recipe->inputs[i]._version() != recipe->versions[i]) return nullptr;
  return recipe;
}

// In a backward that is recorded itself (create_graph=True) the output comes with its graph, as a retained one would.
inline Tensor follow_recipe(const Tensor& gate, const Tensor& up, const Tensor& rng_state, std::string_view kind,
                            double dropout_p) {
  const std::optional<Tensor> state = rng_state.defined() ? std::optional(rng_state) : std::nullopt;
  return up.defined() ? gated_activation(gate, up, kind, dropout_p, state) : activation(gate, kind, dropout_p, state);
}

}  // namespace safe_kernels
