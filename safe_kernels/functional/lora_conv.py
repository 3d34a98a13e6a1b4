"""A convolution and its LoRA adapter in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_kernels.functional.checks import check_number
from safe_kernels.functional.random import state_of_call


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    *,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Compute a convolution with its LoRA adapter: ``conv(x) + scaling * lora_B(lora_A(dropout(x)))``.

    Works over 1 to 3 dimensions of positions. As in PEFT, lora_A is a convolution with the kernel and the steps of the
    base layer, and lora_B one with a kernel of size 1. PyTorch's own convolutions compute all products.

    Retained bytes depend on the arguments that require grad:

    * lora_A or lora_B: x, once for all layers that read it, and with dropout 16 bytes of random state. Only lora_B
      (LoRA-FA): ``lora_A(dropout(x))``, r channels, instead of x.
    * only x (a frozen adapter): nothing, with dropout 16 bytes. PyTorch's convolution retains x here.
    * only bias: nothing. None of them: there is no graph node.

    Args:
        x: [N, d_in, *positions], or [d_in, *positions]; float64, float32, bfloat16 or float16, any strides.
        weight: [d_out, d_in / groups, *kernel], without requires_grad; its product is computed in the dtype of x.
        bias: [d_out], or None.
        lora_A: [r, d_in, *kernel]; the adapter is computed in its dtype.
        lora_B: [d_out, r / groups, 1, ...], of the dtype of lora_A.
        scaling: lora_alpha / r, or / sqrt(r) for rsLoRA.
        stride: one number per dimension of positions, for weight and lora_A.
        padding: the same, zeros.
        dilation: the same.
        groups: of weight and lora_B.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into the adapter.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new tensor [N, d_out, *positions], typed like `x`, in the memory format that PyTorch's convolution gives.

    Raises:
        ValueError: The shapes do not fit together, `dropout_p` is outside [0, 1], or `weight` requires grad.
        TypeError: `scaling` is a tensor that requires grad, or a dtype is not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> layer = torch.nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
        >>> A, B = torch.randn(4, 3, 3, 3, requires_grad=True), torch.zeros(8, 4, 1, 1, requires_grad=True)
        >>> x = torch.randn(2, 3, 16, 16)
        >>> out = safe_kernels.lora_conv(x, layer.weight, layer.bias, A, B, 2.0, (1, 1), (1, 1), (1, 1), dropout_p=0.1)
        >>> torch.allclose(out, layer(x), atol=1e-5)  # the new adapter changes nothing
        True
    """
    check_number(scaling, "scaling")
    rng_state = state_of_call(x, dropout_p, rng_state)
    op = torch.ops.safe_kernels.lora_conv
    return op(x, weight, bias, lora_A, lora_B, scaling, stride, padding, dilation, groups, dropout_p, rng_state)
