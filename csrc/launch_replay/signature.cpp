#include "launch_replay/signature.h"

#include <ATen/Context.h>

#include <cstring>

namespace safe_kernels::launch_replay {

namespace {

// Triton compiles a separate kernel for addresses divisible by 16.
constexpr uintptr_t kAligned = 16;

enum Kind : int64_t { kNone, kTensor, kNumber, kText };

class Writer {
 public:
  explicit Writer(std::string& key) : key_(key) {}

  template <typename Number>
  void add(Number number) {
    static_assert(sizeof(Number) == sizeof(int64_t));
    key_.append(reinterpret_cast<const char*>(&number), sizeof(number));
  }

  void add(c10::IntArrayRef numbers) {
    for (const int64_t number : numbers) add(number);
  }

  void add_text(std::string_view text) {
    add<int64_t>(kText);
    add<int64_t>(static_cast<int64_t>(text.size()));
    key_.append(text);
  }

 private:
  std::string& key_;
};

// The key notes which tensors share an address, since a record finds a kernel's argument by its address.
void add_tensor(const Tensor& tensor, Writer& writer, std::vector<Tensor>& tensors) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  size_t same = 0;
  while (same < tensors.size() && tensors[same].const_data_ptr() != tensor.const_data_ptr()) ++same;
  const auto device = tensor.device();
  writer.add<int64_t>(kTensor);
  writer.add(static_cast<int64_t>(tensor.scalar_type()) << 32 | static_cast<int64_t>(device.type()) << 16 |
             static_cast<int64_t>(static_cast<uint8_t>(device.index())) << 8 |
             static_cast<int64_t>(address % kAligned == 0));
  writer.add(static_cast<int64_t>(same) << 32 | tensor.dim());
  writer.add(tensor.sizes());
  writer.add(tensor.strides());
  tensors.push_back(tensor);
}

bool add_value(const c10::IValue& value, Writer& writer, std::vector<Tensor>& tensors) {
  if (value.isNone() || (value.isTensor() && !value.toTensor().defined())) {
    writer.add<int64_t>(kNone);
  } else if (value.isTensor()) {
    add_tensor(value.toTensor(), writer, tensors);
  } else if (value.isDouble()) {
    writer.add<int64_t>(kNumber);
    writer.add(value.toDouble());
  } else if (value.isInt() || value.isBool()) {
    writer.add<int64_t>(kNumber);
    writer.add<int64_t>(value.isInt() ? value.toInt() : static_cast<int64_t>(value.toBool()));
  } else if (value.isBoolList()) {
    for (const bool flag : value.toBoolList()) writer.add<int64_t>(static_cast<int64_t>(flag));
  } else if (value.isString()) {
    writer.add_text(value.toStringRef());
  } else {
    return false;
  }
  return true;
}

}  // namespace

std::optional<Signature> signature_of(c10::ArrayRef<c10::IValue> arguments) {
  Signature found;
  found.key.reserve(512);
  Writer writer(found.key);
  for (const auto& value : arguments)
    if (!add_value(value, writer, found.tensors)) return std::nullopt;
  if (found.tensors.empty()) return std::nullopt;
  // The process's setting for tf32 changes the kernels.
  writer.add(
      static_cast<int64_t>(at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL)));
  return found;
}

}  // namespace safe_kernels::launch_replay
