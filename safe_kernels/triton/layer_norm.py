"""LayerNorm on a GPU, with the kernels of safe_kernels/triton/lib/norms.py."""

from __future__ import annotations

from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.lib.norms import LONGEST, Affine, norm_backward, norm_forward
from safe_kernels.triton.runtime.host import served_by
from safe_kernels.triton.runtime.launch_replay import empty


@served_by(reference.layer_norm, longest=LONGEST)
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, retain_output: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_forward(x, Affine(weight, bias, 0.0), eps, centred=True)


@served_by(reference.layer_norm_backward, longest=LONGEST)
def layer_norm_backward(
    grad: Tensor,
    retained: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    from_output: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    like_weight, like_bias = retained if weight is None else weight, retained if bias is None else bias
    wanted = (output_mask[0], output_mask[1] and weight is not None, output_mask[2] and bias is not None)
    grad_x, weights, biases = norm_backward(
        grad, retained, Affine(weight, bias, 0.0), (mean, rstd), True, from_output or mean is None, wanted
    )
    return (
        grad_x,
        empty(like_weight, 0) if weights is None else weights.to(like_weight.dtype),
        empty(like_bias, 0) if biases is None else biases.to(like_bias.dtype),
    )
