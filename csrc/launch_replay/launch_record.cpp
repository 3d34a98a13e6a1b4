#include "launch_replay/launch_record.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace safe_kernels::launch_replay {

namespace {

// The part of CUDA's driver that launches need, looked up in the library that the process has loaded: the extension is
// built without CUDA, and also runs without it. From cuda.h: CUresult is an int, 0 is success, and contexts, functions
// and streams are opaque pointers.
struct Driver {
  int (*get_context)(void** context) = nullptr;
  int (*launch_kernel)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                       void* stream, void** parameters, void** extra) = nullptr;
  int (*error_string)(int error, const char** text) = nullptr;

  Driver() {
#ifdef __linux__
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return;
    find(library, "cuCtxGetCurrent", get_context);
    find(library, "cuLaunchKernel", launch_kernel);
    find(library, "cuGetErrorString", error_string);
#endif
  }

#ifdef __linux__
  template <typename Pointer>
  static void find(void* library, const char* name, Pointer& pointer) {
    pointer = reinterpret_cast<Pointer>(dlsym(library, name));
  }
#endif

  bool complete() const { return get_context != nullptr && launch_kernel != nullptr && error_string != nullptr; }
};

// Called only when a record exists; recording one has loaded the driver.
const Driver& driver() {
  static const Driver found;
  return found;
}

void start(void* function, const Grid& grid, void* stream, void** parameters) {
  const auto& [x, y, z] = grid.programs;
  const int error =
      driver().launch_kernel(function, x, y, z, grid.threads, 1, 1, grid.shared, stream, parameters, nullptr);
  if (error == 0) return;
  const char* text = "unknown";
  driver().error_string(error, &text);
  TORCH_CHECK(false, "safe_kernels cannot launch a kernel: CUDA error ", error, " (", text, ")");
}

// A CPU has no streams; it runs records only in tests.
void* current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

void carry_out(const LaunchRecord::Launch& launch, const std::vector<Tensor>& tensors, void* stream) {
  c10::SmallVector<uint64_t, 32> values;
  for (const auto& argument : launch.arguments) {
    const bool is_number = argument.tensor < 0;
    values.push_back(is_number ? argument.value
                               : reinterpret_cast<uint64_t>(tensors.at(argument.tensor).data_ptr()) + argument.value);
  }
  c10::SmallVector<void*, 32> parameters;
  for (auto& value : values) parameters.push_back(&value);
  start(reinterpret_cast<void*>(launch.function), launch.grid, stream, parameters.data());
}

Tensor view(const LaunchRecord::View& view, const std::vector<Tensor>& tensors) {
  const auto& tensor = tensors.at(view.tensor);
  return tensor.as_strided(view.sizes, view.strides, tensor.storage_offset() + view.offset);
}

void carry_out(const LaunchRecord::Product& product, const std::vector<Tensor>& tensors, void* /*stream*/) {
  view(product.out, tensors).addmm_(view(product.left, tensors), view(product.right, tensors));
}

}  // namespace

bool can_launch() {
  void* context = nullptr;
  return driver().complete() && driver().get_context(&context) == 0 && context != nullptr;
}

std::vector<Tensor> replay(const LaunchRecord& record, std::vector<Tensor> tensors) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto device = tensors.front().device();
  const size_t given = tensors.size();
  const c10::DeviceGuard guard(device);
  void* const stream = current_stream(device);
  tensors.resize(given + record.allocations.size());
  const auto allocate = [&](size_t step) {
    for (size_t i = 0; i < record.allocations.size(); ++i)
      if (record.allocations[i].first == step)
        tensors[given + i] = at::empty(record.allocations[i].sizes,
                                       at::TensorOptions().dtype(record.allocations[i].dtype).device(device));
  };
  for (size_t i = 0; i < record.steps.size(); ++i) {
    allocate(i);
    std::visit([&](const auto& step) { carry_out(step, tensors, stream); }, record.steps[i]);
    for (size_t j = 0; j < record.allocations.size(); ++j)
      if (record.allocations[j].last == i) tensors[given + j].reset();
  }
  allocate(record.steps.size());
  std::vector<Tensor> results;
  for (const int64_t index : record.results) results.push_back(tensors.at(given + index));
  return results;
}

}  // namespace safe_kernels::launch_replay
