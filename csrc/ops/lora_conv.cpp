#include "ops/lora_conv.h"

namespace safe_kernels {

TORCH_LIBRARY_FRAGMENT(safe_kernels, m) {
  define_op(m,
            "lora_conv(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
            "int[] stride, int[] padding, int[] dilation, int groups=1, float dropout_p=0., Tensor? rng_state=None) "
            "-> Tensor");
  define_op(m,
            "lora_conv_backward(Tensor grad, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
            "SymInt[] x_size, int[] stride, int[] padding, int[] dilation, int groups, float dropout_p, "
            "Tensor? rng_state, bool[3] output_mask) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
}

}  // namespace safe_kernels
