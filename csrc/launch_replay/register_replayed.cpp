// An op with a host function in Python, which runs once per kind of call; after that its launch record is replayed.

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include "launch_replay/launch_record.h"
#include "module.h"

namespace py = pybind11;

namespace safe_kernels::launch_replay {

namespace {

// Triton compiles a separate kernel for addresses divisible by 16.
constexpr uintptr_t kAligned = 16;

enum Kind : int64_t { kNone, kTensor, kNumber, kText };

template <typename Number>
void append(std::string& key, Number number) {
  static_assert(sizeof(Number) == sizeof(int64_t));
  key.append(reinterpret_cast<const char*>(&number), sizeof(number));
}

// The key shows which tensors share an address, since a record finds a kernel's argument by its address.
void append_tensor(std::string& key, const Tensor& tensor, std::vector<Tensor>& tensors) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  size_t same = 0;
  while (same < tensors.size() && tensors[same].const_data_ptr() != tensor.const_data_ptr()) ++same;
  const auto device = tensor.device();
  append<int64_t>(key, kTensor);
  append(key, static_cast<int64_t>(tensor.scalar_type()) << 32 | static_cast<int64_t>(device.type()) << 16 |
                  static_cast<int64_t>(static_cast<uint8_t>(device.index())) << 8 |
                  static_cast<int64_t>(address % kAligned == 0));
  append(key, static_cast<int64_t>(same) << 32 | tensor.dim());
  for (const int64_t size : tensor.sizes()) append(key, size);
  for (const int64_t stride : tensor.strides()) append(key, stride);
  tensors.push_back(tensor);
}

bool append_value(std::string& key, const c10::IValue& value, std::vector<Tensor>& tensors) {
  if (value.isNone() || (value.isTensor() && !value.toTensor().defined())) {
    append<int64_t>(key, kNone);
  } else if (value.isTensor()) {
    append_tensor(key, value.toTensor(), tensors);
  } else if (value.isDouble()) {
    append<int64_t>(key, kNumber);
    append(key, value.toDouble());
  } else if (value.isInt() || value.isBool()) {
    append<int64_t>(key, kNumber);
    append<int64_t>(key, value.isInt() ? value.toInt() : static_cast<int64_t>(value.toBool()));
  } else if (value.isBoolList()) {
    for (const bool flag : value.toBoolList()) append<int64_t>(key, static_cast<int64_t>(flag));
  } else if (value.isString()) {
    append<int64_t>(key, kText);
    append(key, value.toStringRef().size());
    key.append(value.toStringRef());
  } else {
    return false;
  }
  return true;
}

// The key of a launch record: all properties of a call's arguments except contents and addresses.
struct Signature {
  std::string key;
  std::vector<Tensor> tensors;  // of the arguments, in their order
};

// Empty if an argument has a kind that no op here takes, or if no argument is a tensor.
std::optional<Signature> signature_of(c10::ArrayRef<c10::IValue> arguments) {
  Signature found;
  found.key.reserve(512);
  for (const auto& value : arguments)
    if (!append_value(found.key, value, found.tensors)) return std::nullopt;
  if (found.tensors.empty()) return std::nullopt;
  // The process's setting for tf32 changes the kernels.
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  append(found.key, static_cast<int64_t>(precision));
  return found;
}

// Batches of many lengths may have more kinds of calls; then the least recently used records are dropped.
constexpr size_t kMaxRecords = 4096;

// Records of one op by signature. Null: a call that cannot have a record, since it does more than allocate and launch.
class Records {
 public:
  bool find(const std::string& key, std::shared_ptr<const LaunchRecord>& record) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_key_.find(key);
    if (found == by_key_.end()) return false;
    by_use_.splice(by_use_.begin(), by_use_, found->second);
    record = found->second->record;
    return true;
  }

  // Does nothing if records were dropped since the call began: this record may depend on the earlier state.
  void add(std::string key, std::shared_ptr<const LaunchRecord> record, size_t age) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (age != age_ || by_key_.count(key) != 0) return;  // another thread may have been faster
    if (by_use_.size() >= kMaxRecords) {
      by_key_.erase(by_use_.back().key);
      by_use_.pop_back();
    }
    by_use_.push_front({std::move(key), std::move(record)});
    by_key_.emplace(by_use_.front().key, by_use_.begin());
  }

  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    by_key_.clear();
    by_use_.clear();
    ++age_;
  }

  // How often records have been dropped.
  size_t age() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return age_;
  }

  size_t count() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return by_use_.size();
  }

 private:
  struct Entry {
    std::string key;
    std::shared_ptr<const LaunchRecord> record;
  };

  mutable std::mutex mutex_;
  size_t age_ = 0;
  std::list<Entry> by_use_;                                                  // the last used first
  std::unordered_map<std::string_view, std::list<Entry>::iterator> by_key_;  // the keys are those of the entries
};

// By op. Never destroyed: the dispatcher may call an op until the process ends.
std::unordered_map<std::string, std::shared_ptr<Records>>& all_records() {
  static auto* records = new std::unordered_map<std::string, std::shared_ptr<Records>>();
  return *records;
}

py::object to_python(const c10::IValue& value) {
  if (value.isNone() || (value.isTensor() && !value.toTensor().defined())) return py::none();
  if (value.isTensor()) return py::cast(value.toTensor());
  if (value.isDouble()) return py::float_(value.toDouble());
  if (value.isInt()) return py::int_(value.toInt());
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isString()) return py::str(value.toStringRef());
  TORCH_INTERNAL_ASSERT(value.isBoolList(), "no op of safe_kernels takes ", value.tagKind());
  py::list flags;
  for (const bool flag : value.toBoolList()) flags.append(flag);
  return flags;
}

class ReplayedOp final : public c10::OperatorKernel {
 public:
  ReplayedOp(py::object host, py::object recorded, std::shared_ptr<Records> records)
      : host_(host.release().ptr()), recorded_(recorded.release().ptr()), records_(std::move(records)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) const {
    const size_t count = op.schema().arguments().size();
    const auto arguments = torch::jit::last(*stack, count);
    auto signature = signature_of(arguments);
    std::shared_ptr<const LaunchRecord> record;
    const bool is_known = signature.has_value() && records_->find(signature->key, record);
    std::vector<Tensor> results;
    if (record != nullptr && can_launch()) {
      results = replay(*record, std::move(signature->tensors));
    } else if (is_known || !signature.has_value()) {
      results = ask(host_, arguments, nullptr);
    } else {
      results = ask(recorded_, arguments, &*signature);
    }
    torch::jit::drop(*stack, count);
    for (auto& result : results) stack->emplace_back(std::move(result));
  }

 private:
  // Calls a function in Python. `recorded` returns the result of `host`, the call's record or None, and whether that
  // holds for every call like it.
  std::vector<Tensor> ask(PyObject* function, c10::ArrayRef<c10::IValue> arguments, Signature* signature) const {
    const py::gil_scoped_acquire gil;
    const size_t age = records_->age();
    py::tuple given(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) given[i] = to_python(arguments[i]);
    auto found = py::reinterpret_steal<py::object>(PyObject_CallObject(function, given.ptr()));
    if (!found) {
      python_error error;
      error.persist();  // this thread's Python state may be gone when it is caught
      throw error;
    }
    if (signature != nullptr) {
      auto [result, record, holds] = found.cast<std::tuple<py::object, std::shared_ptr<LaunchRecord>, bool>>();
      if (holds) records_->add(std::move(signature->key), std::move(record), age);
      found = std::move(result);
    }
    if (!py::isinstance<py::tuple>(found)) return {found.cast<Tensor>()};
    return found.cast<std::vector<Tensor>>();
  }

  // Never freed, for the same reason as the records.
  PyObject* host_;
  PyObject* recorded_;
  std::shared_ptr<Records> records_;
};

// A registration lives as long as its library object.
void register_replayed(const std::string& op, py::object host, py::object recorded, const std::string& key) {
  static auto* libraries = new std::vector<std::unique_ptr<torch::Library>>();
  auto& records = all_records()[op];
  if (records == nullptr) records = std::make_shared<Records>();
  libraries->push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "safe_kernels",
                                                        c10::parseDispatchKey(key), __FILE__, __LINE__));
  libraries->back()->impl(op.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                          std::make_unique<ReplayedOp>(std::move(host), std::move(recorded), records)));
}

using PyView = std::tuple<int64_t, std::vector<int64_t>, std::vector<int64_t>, int64_t>;
using PyProduct = std::tuple<PyView, PyView, PyView>;
using PyLaunch =
    std::tuple<uint64_t, std::array<unsigned, 3>, unsigned, unsigned, std::vector<std::pair<int64_t, uint64_t>>>;
using PyAllocation = std::tuple<std::vector<int64_t>, at::ScalarType, int64_t, int64_t>;

LaunchRecord::View to_view(const PyView& view) {
  const auto& [tensor, sizes, strides, offset] = view;
  return {tensor, sizes, strides, offset};
}

LaunchRecord::Launch to_launch(const PyLaunch& launch) {
  const auto& [function, programs, threads, shared, arguments] = launch;
  LaunchRecord::Launch found{function, {programs, threads, shared}, {}};
  for (const auto& [tensor, value] : arguments) found.arguments.push_back({tensor, value});
  return found;
}

std::shared_ptr<LaunchRecord> make_record(const std::vector<PyAllocation>& allocations,
                                          const std::vector<std::variant<PyLaunch, PyProduct>>& steps,
                                          std::vector<int64_t> results) {
  auto record = std::make_shared<LaunchRecord>();
  for (const auto& [sizes, dtype, first, last] : allocations)
    record->allocations.push_back({sizes, dtype, static_cast<size_t>(first), static_cast<size_t>(last)});
  for (const auto& step : steps) {
    if (const auto* launch = std::get_if<PyLaunch>(&step)) {
      record->steps.emplace_back(to_launch(*launch));
    } else {
      const auto& [out, left, right] = std::get<PyProduct>(step);
      record->steps.emplace_back(LaunchRecord::Product{to_view(out), to_view(left), to_view(right)});
    }
  }
  record->results = std::move(results);
  return record;
}

void forget_records() {
  for (auto& [op, records] : all_records()) records->forget();
}

std::unordered_map<std::string, size_t> record_counts() {
  std::unordered_map<std::string, size_t> counts;
  for (const auto& [op, records] : all_records()) counts[op] = records->count();
  return counts;
}

}  // namespace

}  // namespace safe_kernels::launch_replay

namespace safe_kernels {

void bind_launch_replay(py::module_& m) {
  using namespace launch_replay;
  py::class_<LaunchRecord, std::shared_ptr<LaunchRecord>>(m, "LaunchRecord")
      .def(py::init(&make_record), py::arg("allocations"), py::arg("steps"), py::arg("results"));
  m.def("register_replayed", &register_replayed, py::arg("op"), py::arg("host"), py::arg("recorded"), py::arg("key"));
  m.def("forget_records", &forget_records);
  m.def("record_counts", &record_counts);
}

}  // namespace safe_kernels
