#include "launch_replay/driver.h"

#include <c10/util/Exception.h>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace safe_kernels::launch_replay {

namespace {

// CUDA driver API, cuda.h: CUresult is an int, 0 is success, and contexts, functions and streams are opaque pointers.
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

}  // namespace

bool can_launch() {
  void* context = nullptr;
  return driver().complete() && driver().get_context(&context) == 0 && context != nullptr;
}

void launch(void* function, const Grid& grid, void* stream, void** parameters) {
  const auto& [x, y, z] = grid.programs;
  const int error =
      driver().launch_kernel(function, x, y, z, grid.threads, 1, 1, grid.shared, stream, parameters, nullptr);
  if (error == 0) return;
  const char* text = "unknown";
  driver().error_string(error, &text);
  TORCH_CHECK(false, "safe_kernels cannot launch a kernel: CUDA error ", error, " (", text, ")");
}

}  // namespace safe_kernels::launch_replay
