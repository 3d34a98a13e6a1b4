#include "ops/dropout.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m, "dropout(Tensor x, float dropout_p, Tensor rng_state) -> Tensor");
}

}  // namespace safe_kernels
