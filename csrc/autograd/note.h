// Notes that are attached to a tensor and die with it. An alias of the tensor does not have the note. The note counts
// x.detach(), NumPy arrays, and aliases that share the memory but not the version counter (x.data).

#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <atomic>
#include <optional>

namespace safe_kernels {

using at::Tensor;

struct Note : c10::BackendMeta {
  mutable std::atomic<int64_t> aliases = 0;  // made since the note was attached

  c10::intrusive_ptr<c10::BackendMeta> clone(const c10::intrusive_ptr<c10::BackendMeta>& /*self*/) const override {
    if (!is_packing()) ++aliases;
    return {};
  }

  // Whether a saved-tensor hook is probably running: PyTorch calls hooks with recording off.
  // Activation checkpointing's hooks make an alias only when forward runs again, but both runs must do the same.
  static bool is_packing() {
    return !at::GradMode::is_enabled() && at::SavedTensorDefaultHooks::get_hooks().has_value();
  }
};

template <class Kind>
Kind* find_note(const Tensor& tensor) {
  return dynamic_cast<Kind*>(tensor.unsafeGetTensorImpl()->get_backend_meta());
}

// False if the slot is taken: the device's backend has priority.
inline bool attach_note(const Tensor& tensor, c10::intrusive_ptr<c10::BackendMeta> note) {
  if (tensor.unsafeGetTensorImpl()->get_backend_meta() != nullptr) return false;
  tensor.unsafeGetTensorImpl()->set_backend_meta(std::move(note));
  return true;
}

inline c10::StorageImpl* storage_of(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// Whether a compiler traces the call. The tensors have no memory to share yet, and equal calls become one.
inline bool is_traced() {
  using c10::impl::TorchDispatchModeKey;
  return c10::impl::TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::FUNCTIONAL).has_value() ||
         c10::impl::TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::PROXY).has_value();
}

// A note on the direct output of an op, attached directly after the output gets its node.
struct OutputNote : Note {
  int64_t version = 0;
  const void* node = nullptr;  // compared, never dereferenced
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;

  explicit OutputNote(const Tensor& out) : version(out._version()), node(out.grad_fn().get()) {
    if (storage_of(out) != nullptr) storage = out.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl();
  }

  // Whether the tensor is still the op's result, as far as this can be known.
  bool is_unchanged(const Tensor& out) const {
    if (out.grad_fn() == nullptr || out.grad_fn().get() != node) return false;
    if (aliases != 0 || out._version() != version) return false;
    // Assigning to out.data changes neither version nor node.
    const auto* target = storage.has_value() ? storage->_unsafe_get_target() : nullptr;
    return target == storage_of(out);
  }
};

}  // namespace safe_kernels
