#include "ops/linear_cross_entropy.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100, "
            "float scaling=1., float softcap=0.) -> Tensor");
  define_op(m,
            "linear_cross_entropy_backward(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
            "float scaling, float softcap) -> (Tensor loss, Tensor grad_x)");
}

}  // namespace safe_kernels
