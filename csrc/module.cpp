// Loading this module registers every op in this folder. Python adds its host functions.

#include "module.h"

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "autograd/norm_output.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the ops of safe_kernels with PyTorch's dispatcher.";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("announce_reader", &safe_kernels::announce_reader);
  m.def("leave_hooks",
        [](const at::Tensor& out, pybind11::handle hook) { safe_kernels::leave_hooks(out, hook.ptr()); });
  safe_kernels::bind_inversion(m);
  safe_kernels::bind_launch_replay(m);
}
