// A recipe replaces a retained tensor: the output of an activation carries the activation's inputs, which the
// activation's node retains anyway. A reader retains those inputs instead, and recomputes the output in backward.
//
// The recipe is attached to the output and dies with it. The activation's node is the wrong place for it: saved tensors
// may be unpacked only in backward, and only once (saved_tensors_hooks, activation checkpointing), and another reader's
// backward may have freed them; further tensors held by the node would outlive a checkpointed forward. The reader saves
// the inputs like any node saves a tensor, so that all hooks and version checks apply.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "autograd/note.h"
#include "checks.h"
#include "ops/activation.h"
#include "ops/gated_activation.h"

namespace safe_kernels {

struct Recipe : OutputNote {
  using OutputNote::OutputNote;

  std::array<Tensor, 3> inputs;  // gate, up, rng_state; up only if gated, rng_state only with dropout
  std::string kind;
  double dropout_p = 0.0;
  // When the output was made: after an in-place change of an input the recipe is invalid.
  std::array<int64_t, 3> versions{};
};

// Called directly after an activation's output gets its node; `up` is undefined for a plain activation.
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

// The recipe of `x`; null if x is not the direct output of an activation, or if x or an input may have changed.
inline const Recipe* find_recipe(const Tensor& x) {
  const auto* recipe = find_note<Recipe>(x);
  if (recipe == nullptr || !recipe->is_unchanged(x)) return nullptr;
  for (size_t i = 0; i < recipe->inputs.size(); ++i)
    if (recipe->inputs[i].defined() && recipe->inputs[i]._version() != recipe->versions[i]) return nullptr;
  return recipe;
}

// In a recorded backward (create_graph=True) the output has a graph, like a retained output. A compiler gets a call
// that differs from forward's: it would merge equal calls, and retain the output from forward to backward.
inline Tensor follow_recipe(const Tensor& gate, const Tensor& up, const Tensor& rng_state, std::string_view kind,
                            double dropout_p) {
  const std::optional<Tensor> state = or_none(rng_state);
  if (is_traced())
    return up.defined() ? gated_activation_again(gate, up, kind, dropout_p, state)
                        : activation_again(gate, kind, dropout_p, state);
  return up.defined() ? gated_activation(gate, up, kind, dropout_p, state) : activation(gate, kind, dropout_p, state);
}

}  // namespace safe_kernels
