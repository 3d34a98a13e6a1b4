"""Whether a norm's output may be retained in place of its input: whether it can be inverted without loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safe_kernels import _C

__all__ = ["LIMIT", "fingerprint", "invertible", "leave_hooks", "marks"]

LIMIT = 3.0
"""Largest |bias| / |weight| that keeps the gradient as exact as PyTorch's own: measured, see `invertible`."""


def invertible(
    weight: Tensor | None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    limit: float = LIMIT,
    *,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether `rms_norm` or `layer_norm` with these parameters may be called with ``retain_output=True``.

    Backward then finds the normalised row as ``x_hat = (out - bias) / (weight + weight_offset)``. Rounding ``out`` to
    its dtype moves it by eps/2 * (|x_hat| + |bias| / |weight + weight_offset|) at most: a zero weight has lost
    its feature, and a bias far larger than its weight hides it.

    `LIMIT` was found by measurement: with every feature at the same ratio, d = 33 and 384, eight seeds, and gradients
    from random ones to ones parallel to ``x_hat`` (for which the error counts in full), the error of grad_x relative to
    that of `torch.nn.functional.layer_norm` was at worst (root mean square / largest element)

    ======== ========= ========= ========= ========= ========= =========
    ratio    0         2         3         4         8         16
    ======== ========= ========= ========= ========= ========= =========
    float32  1.1 / 1.5 1.2 / 1.5 1.3 / 1.8 1.5 / 1.8 2.1 / 1.8 3.9 / 2.7
    bfloat16 0.7 / 1.0 1.1 / 1.2 1.6 / 1.6 2.1 / 1.8 4.0 / 2.9 8.2 / 5.3
    float16  0.7 / 1.3 1.1 / 1.4 1.6 / 1.7 2.1 / 2.4 4.1 / 3.0 8.2 / 5.5
    ======== ========= ========= ========= ========= ========= =========

    so that 3 keeps both below twice, and 4 does not. ``tests/kernels/test_norm_inversion.py`` holds it
    there. This reads values. On a CPU that costs next to nothing. Elsewhere it waits for the device, so that a caller
    asks again only when `marks` have changed.

    Args:
        weight: [d]; None for ones.
        bias: [d]; None for zeros.
        weight_offset: added to the weight, as in `rms_norm`.
        limit: largest |bias| / |weight + weight_offset|.
        dtype: of the norm's output, where it differs from the weight's (autocast, a norm in float32 over a model in
            float16): a weight below its smallest normal number would lose bits of the output.

    Returns:
        True when every |weight + weight_offset| is finite and large enough, and every ratio at most `limit`.

    Example:
        >>> import torch
        >>> from safe_kernels import invertible
        >>> invertible(torch.ones(4), torch.full((4,), 0.5)), invertible(torch.tensor([1.0, 0.0]))
        (True, False)
    """
    like = weight if weight is not None else bias
    if like is None:
        return True
    smallest = torch.finfo(like.dtype if dtype is None else dtype).smallest_normal
    found = _C.invertible(weight, bias, weight_offset, limit, smallest)
    return _look(like, weight, bias, weight_offset, limit, smallest) if found is None else found


def _look(
    like: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float, limit: float, smallest: float
) -> bool:
    scale = torch.ones_like(like) if weight is None else weight
    size = (scale.detach().double() + offset).abs()
    shift = torch.zeros_like(size) if bias is None else bias.detach().double().abs()
    # A comparison with NaN is False, and so is the answer.
    usable = (size >= smallest) & torch.isfinite(size) & (shift <= limit * size)
    return bool(usable.all())


def marks(tensor: Tensor) -> tuple[int, ...] | None:
    """What a write to a tensor's values changes, without reading them, so without waiting for a device.

    They are the tensor's identity, its count of versions, its address, its dtype, and how many aliases of it were made,
    since a write through ``tensor.data`` counts no version. A kernel that is given the bare address is not noticed.

    Args:
        tensor: any; from now on its aliases are counted.

    Returns:
        Values to compare with those of an earlier call; None where an alias lives, through which anybody may write.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> before = marks(weight)
        >>> before == marks(weight), weight.data.zero_().sum().item(), before == marks(weight)
        (True, 0.0, False)
    """
    found = _held(tensor)
    return None if found is None or found[0] != _ALONE else found[1:]


def fingerprint(tensor: Tensor) -> int | None:
    """A number that changes with a tensor's values, also where they are written through ``tensor.data``.

    It reads them all, so it is meant for what is small: the weights of norms, and biases.

    Args:
        tensor: any.

    Returns:
        Values to compare with those of an earlier call; None where the values cannot be read without waiting for a
        device, or without making a copy.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> before = fingerprint(weight)
        >>> before == fingerprint(weight), weight.data.zero_().sum().item(), before == fingerprint(weight)
        (True, 0.0, False)
    """
    return _C.fingerprint(tensor)


def leave_hooks(x: Tensor, unpack: Callable[..., Any]) -> None:
    """Says that `x` was made under saved-tensor hooks which have ended, and that what reads it now is not under them.

    Where `x` is the output of a norm, a reader under the hooks that are current now counts then as one under the
    norm's own hooks would.

    Args:
        x: any tensor; nothing happens to other ones.
        unpack: the object that was given to `torch.autograd.graph.saved_tensors_hooks` for unpacking.

    Example:
        >>> import safe_kernels
        >>> from safe_kernels.retention import announce_reader
        >>> x, weight, get = torch.ones(2, 8, requires_grad=True), torch.ones(8), lambda kept: kept[0]
        >>> def run(leave):
        ...     with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor,), get):
        ...         y = safe_kernels.rms_norm(x * 1.0, weight, 1e-6)
        ...     leave(y, get)
        ...     announce_reader(y)
        ...     return y
        >>> run(leave_hooks).grad_fn is not None
        True
    """
    _C.leave_hooks(x, unpack)


def _held(tensor: Tensor) -> tuple[int, ...] | None:
    tensor.untyped_storage()  # Python's handle of the memory counts as a holder once it was made, in new versions
    return _C.marks(tensor)


_ALONE = (_held(torch.empty(1, device="cpu")) or (1,))[0]
"""How many hold the memory of a tensor that has no alias."""
