// Properties of a norm's parameters that need no wait for a device: see safe_kernels/inversion.py.

#include <ATen/Dispatch.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <tuple>

#include "autograd/note.h"
#include "module.h"
#include "readable.h"

namespace py = pybind11;

namespace safe_kernels {

namespace {

struct Bounds {
  double offset, limit, smallest;
};

template <typename T>
bool all_usable(const T* weight, const T* bias, int64_t count, const Bounds& bounds) {
  int bad = 0;
  // NaN fails every comparison, and infinity the second.
  for (int64_t i = 0; i < count; ++i) {
    const double size = std::abs((weight == nullptr ? 1.0 : static_cast<double>(weight[i])) + bounds.offset);
    const double shift = bias == nullptr ? 0.0 : std::abs(static_cast<double>(bias[i]));
    bad |= !(size >= bounds.smallest) | !(size < HUGE_VAL) | !(shift <= bounds.limit * size);
  }
  return bad == 0;
}

bool is_readable_like(const std::optional<Tensor>& tensor, const Tensor& like) {
  return !tensor.has_value() ||
         (is_readable(*tensor) && tensor->scalar_type() == like.scalar_type() && tensor->numel() == like.numel());
}

// None if the values cannot be read here without waiting: a tensor on another device, or of an unusual kind.
std::optional<bool> invertible(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double offset,
                               double limit, double smallest) {
  if (!weight.has_value() && !bias.has_value()) return true;
  const Tensor& like = weight.has_value() ? *weight : *bias;
  if (!is_readable_like(weight, like) || !is_readable_like(bias, like)) return std::nullopt;
  const Bounds bounds{offset, limit, smallest};
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "invertible", [&] {
    const auto data = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() : nullptr;
    };
    return all_usable(data(weight), data(bias), like.numel(), bounds);
  });
}

// A serial number that is unique among all tensors, also those that no longer exist.
struct Mark : Note {
  int64_t serial;
  explicit Mark(int64_t serial) : serial(serial) {}
};

const Mark* mark_of(const Tensor& tensor) {
  static std::mutex mutex;
  static int64_t count = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (find_note<Mark>(tensor) == nullptr) attach_note(tensor, c10::make_intrusive<Mark>(++count));
  return find_note<Mark>(tensor);
}

using Marks = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// First the number of holders of the tensor's memory. While the others stay equal, the tensor was not written to,
// except through its bare address.
std::optional<Marks> marks(const Tensor& tensor) {
  if (!tensor.has_storage() || tensor.is_inference()) return std::nullopt;
  const Mark* mark = mark_of(tensor);
  if (mark == nullptr) return std::nullopt;
  const auto holders = static_cast<int64_t>(tensor.unsafeGetTensorImpl()->unsafe_storage().use_count());
  const auto address = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  return Marks{holders,           mark->serial, mark->aliases.load(),
               tensor._version(), address,      static_cast<int64_t>(tensor.scalar_type())};
}

}  // namespace

void bind_inversion(py::module_& m) {
  m.def("invertible", &invertible);
  m.def("marks", &marks);
  m.def("fingerprint", &fingerprint);
}

}  // namespace safe_kernels
