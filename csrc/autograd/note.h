// Notes that hang on a tensor and die with it. No alias of the tensor has one; the note learns of aliases that share
// the memory and not the count of versions (x.data), of x.detach(), and of NumPy's.

#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

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

  // Whether, for all that can be seen, a hook is being given a tensor to save, which PyTorch does without recording.
  // Activation checkpointing's hooks make an alias when a forward runs again and not when it runs first, and both runs
  // must be alike.
  static bool is_packing() {
    return !at::GradMode::is_enabled() && at::SavedTensorDefaultHooks::get_hooks().has_value();
  }
};

template <class Kind>
Kind* find_note(const Tensor& tensor) {
  return dynamic_cast<Kind*>(tensor.unsafeGetTensorImpl()->get_backend_meta());
}

// False where the slot is taken: a device's own use of it goes before ours.
inline bool attach_note(const Tensor& tensor, c10::intrusive_ptr<c10::BackendMeta> note) {
  if (tensor.unsafeGetTensorImpl()->get_backend_meta() != nullptr) return false;
  tensor.unsafeGetTensorImpl()->set_backend_meta(std::move(note));
  return true;
}

inline c10::StorageImpl* storage_of(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// On the direct output of an op that has just got its node.
struct OutputNote : Note {
  int64_t version = 0;
  const void* node = nullptr;  // compared, never followed
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;

  explicit OutputNote(const Tensor& out) : version(out._version()), node(out.grad_fn().get()) {
    if (storage_of(out) != nullptr) storage = out.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl();
  }

  // Whether the tensor that has this note is, for all that can be known, still what the op returned.
  bool is_unchanged(const Tensor& out) const {
    if (out.grad_fn() == nullptr || out.grad_fn().get() != node) return false;
    if (aliases != 0 || out._version() != version) return false;
    // Assigning to out.data changes neither version nor node.
    const auto* target = storage.has_value() ? storage->_unsafe_get_target() : nullptr;
    return target == storage_of(out);
  }
};

}  // namespace safe_kernels
