#include "ops/rotary.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m, "rotary(Tensor x, Tensor cos, Tensor sin, bool transposed=False) -> Tensor");
}

}  // namespace safe_kernels
