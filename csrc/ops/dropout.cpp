#include "ops/dropout.h"

#include "checks.h"
#include "dispatch.h"

namespace safe_kernels {

void check_dropout_op(const Tensor& x, double dropout_p, const Tensor& rng_state) {
  check_has_features(x, "x");
  check_dropout(dropout_p, rng_state, x, "x");
}

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m, "dropout(Tensor x, float dropout_p, Tensor rng_state) -> Tensor");
}

}  // namespace safe_kernels
