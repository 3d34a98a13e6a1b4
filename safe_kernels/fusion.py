"""Whether a linear layer and its adapter are better in one: where a kernel does both, unless tuning finds otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from safe_kernels.functional.lora import lora
from safe_kernels.functional.lora_linear import lora_linear
from safe_kernels.triton.runtime import tuning


def prefers_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *, dropout_p: float = 0.0
) -> bool:
    """Whether `lora_linear` serves this call better than `lora` over `torch.nn.functional.linear`.

    On a GPU it does the same products by the same library and moves fewer bytes: the layer's output is not read again,
    and the two gradients of x are not added by autograd. So it is preferred there; with `autotune` on, the first call
    of each size times both, forward and backward. On a CPU it is composed of the two; a compiled graph keeps `lora`,
    since the compiler fuses around it, and so does a layer whose weight trains, as autograd does that best.

    Args:
        x: [..., d_in], as for `lora_linear`.
        weight: [d_out, d_in].
        bias: [d_out], or None.
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        dropout_p: as for `lora_linear`.

    Returns:
        True where the fused op is to be taken.

    Example:
        >>> import torch, safe_kernels
        >>> x, weight, A, B = torch.ones(2, 8), torch.ones(4, 8), torch.ones(1, 8), torch.ones(4, 1)
        >>> safe_kernels.prefers_fused(x, weight, None, A, B)
        False
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or not _has_kernel(x.device) or x.numel() == 0:
        return False
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    tuner = tuning.active()
    if tuner is None:
        return True
    call = _call(x, weight, lora_A, dropout_p)
    offer = partial(_offer, x, weight, bias, lora_A, lora_B, dropout_p)
    if torch.is_inference_mode_enabled() or x.is_inference():
        return tuner.choose(call, offer, None) == "lora_linear"
    # What a call takes first holds: a checkpointed forward must find the same op when it runs again.
    return tuner.choose(call, offer, x if _is_unseen() else None, otherwise="lora") == "lora_linear"


@cache
def _has_kernel(where: torch.device) -> bool:
    """Whether the dispatcher has a kernel for `lora_linear` there: the reference composes it, and fuses nothing."""
    key = torch._C._dispatch_key_for_device(where.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("safe_kernels::lora_linear", key)


def _call(x: Tensor, weight: Tensor, lora_A: Tensor, dropout_p: float) -> tuning.Call:
    (d_out, d_in), rank = weight.shape, lora_A.shape[0]
    size = tuning.bucket((x.numel() // d_in, d_in, d_out, rank))
    return x.get_device(), "layer", size, x.dtype, lora_A.dtype, dropout_p > 0.0 and "dropout"


def _offer(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> tuple[str, dict[str, tuning.Run]]:
    """A step of each form on leaves of its own; it draws no random numbers."""
    from safe_kernels.triton.runtime import configs

    weight, bias = weight.detach(), None if bias is None else bias.detach()
    options: Any = {"dropout_p": dropout_p, "rng_state": torch.zeros(2, dtype=torch.int64, device=x.device)}

    def over(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora(x, F.linear(x, weight, bias), A, B, 1.0, **options)

    def fused(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, A, B, 1.0, **options)

    forms = {"lora": over, "lora_linear": fused}
    return configs.target().kind, {name: partial(_step, form, x, lora_A, lora_B) for name, form in forms.items()}


def _step(form: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Forward and backward, out of sight of checkpointing's hooks."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad(), saved_tensors_hooks(_same, _same):
        out = form(*leaves)
        torch.autograd.grad(out, leaves, out.detach())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_unseen() -> bool:
    """Whether a graph other than the caller's would go unseen: no mode sees its ops, and hooks can be set."""
    disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return disabled is None and not torch._C._len_torch_dispatch_stack()
