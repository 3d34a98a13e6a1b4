"""RMSNorm on a GPU, with the kernels of safe_kernels/triton/lib/norms.py."""

from __future__ import annotations

from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.lib.norms import LONGEST, Affine, norm_backward, norm_forward
from safe_kernels.triton.runtime.host import served_by
from safe_kernels.triton.runtime.launch_replay import empty


@served_by(reference.rms_norm, longest=LONGEST)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, retain_output: bool = True
) -> tuple[Tensor, Tensor]:
    out, _, rstd = norm_forward(x, Affine(weight, None, weight_offset), eps, centred=False)
    return out, rstd


@served_by(reference.rms_norm_backward, longest=LONGEST)
def rms_norm_backward(
    grad: Tensor,
    retained: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    from_output: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    affine, wanted = Affine(weight, None, weight_offset), (output_mask[0], output_mask[1], False)
    grad_x, weights, _ = norm_backward(grad, retained, affine, (None, rstd), False, from_output, wanted)
    return grad_x, empty(weight, 0) if weights is None else weights.to(weight.dtype)
