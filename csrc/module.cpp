// Loading this module runs the registrations of every op in this folder; Python needs nothing else from it.

#include <pybind11/pybind11.h>
#include <torch/version.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the ops of safe_kernels with PyTorch's dispatcher.";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
}
