#include "launch_replay/plan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>

namespace safe_kernels::launch_replay {

namespace {

// A CPU has no streams; it runs plans only in tests.
void* current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

void carry_out(const Plan::Launch& launch, const std::vector<Tensor>& tensors, void* stream) {
  c10::SmallVector<uint64_t, 32> values;
  for (const auto& argument : launch.arguments) {
    const bool is_number = argument.tensor < 0;
    values.push_back(is_number ? argument.value
                               : reinterpret_cast<uint64_t>(tensors.at(argument.tensor).data_ptr()) + argument.value);
  }
  c10::SmallVector<void*, 32> parameters;
  for (auto& value : values) parameters.push_back(&value);
  launch_replay::launch(reinterpret_cast<void*>(launch.function), launch.grid, stream, parameters.data());
}

Tensor view(const Plan::View& view, const std::vector<Tensor>& tensors) {
  const auto& tensor = tensors.at(view.tensor);
  return tensor.as_strided(view.sizes, view.strides, tensor.storage_offset() + view.offset);
}

void carry_out(const Plan::Product& product, const std::vector<Tensor>& tensors, void* /*stream*/) {
  view(product.out, tensors).addmm_(view(product.left, tensors), view(product.right, tensors));
}

}  // namespace

std::vector<Tensor> replay(const Plan& plan, std::vector<Tensor> tensors) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto device = tensors.front().device();
  const size_t given = tensors.size();
  const c10::DeviceGuard guard(device);
  void* const stream = current_stream(device);
  tensors.resize(given + plan.allocations.size());
  const auto allocate = [&](size_t step) {
    for (size_t i = 0; i < plan.allocations.size(); ++i)
      if (plan.allocations[i].first == step)
        tensors[given + i] =
            at::empty(plan.allocations[i].sizes, at::TensorOptions().dtype(plan.allocations[i].dtype).device(device));
  };
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    allocate(i);
    std::visit([&](const auto& step) { carry_out(step, tensors, stream); }, plan.steps[i]);
    for (size_t j = 0; j < plan.allocations.size(); ++j)
      if (plan.allocations[j].last == i) tensors[given + j].reset();
  }
  allocate(plan.steps.size());
  std::vector<Tensor> results;
  for (const int64_t index : plan.results) results.push_back(tensors.at(given + index));
  return results;
}

}  // namespace safe_kernels::launch_replay
