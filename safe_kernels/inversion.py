"""Whether a norm can be inverted without loss, so that its output may be retained instead of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safe_kernels import _C

__all__ = ["LIMIT", "fingerprint", "invertible", "leave_hooks", "marks"]

LIMIT = 3.0
"""Largest |bias| / |weight| at which the gradient is as exact as PyTorch's. It was measured: see `invertible`."""


def invertible(
    weight: Tensor | None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    limit: float = LIMIT,
    *,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether `rms_norm` or `layer_norm` with these parameters may be called with ``retain_output=True``.

    Backward then computes the normalised row as ``x_hat = (out - bias) / (weight + weight_offset)``. The rounding of
    ``out`` changes this by at most eps/2 * (|x_hat| + |bias| / |weight + weight_offset|). A zero weight loses its
    feature, and a bias much larger than its weight hides it.

    `LIMIT` was found by measurement: with every feature at the same ratio, d = 33 and 384, eight seeds, and gradients
    from random ones to ones parallel to ``x_hat`` (for which the error counts in full), the error of grad_x relative to
    that of `torch.nn.functional.layer_norm` was at worst (root mean square / largest element):

    ======== ========= ========= ========= ========= ========= =========
    ratio    0         2         3         4         8         16
    ======== ========= ========= ========= ========= ========= =========
    float32  1.1 / 1.5 1.2 / 1.5 1.3 / 1.8 1.5 / 1.8 2.1 / 1.8 3.9 / 2.7
    bfloat16 0.7 / 1.0 1.1 / 1.2 1.6 / 1.6 2.1 / 1.8 4.0 / 2.9 8.2 / 5.3
    float16  0.7 / 1.3 1.1 / 1.4 1.6 / 1.7 2.1 / 2.4 4.1 / 3.0 8.2 / 5.5
    ======== ========= ========= ========= ========= ========= =========

    At 3 both errors stay below twice PyTorch's, at 4 they do not; ``tests/kernels/test_norm_inversion.py`` checks
    this. The function reads values. This is cheap on a CPU. On other devices it waits for the device, so callers
    repeat it only if `marks` have changed.

    Args:
        weight: [d]; None for ones.
        bias: [d]; None for zeros.
        weight_offset: added to the weight, as in `rms_norm`.
        limit: largest |bias| / |weight + weight_offset|.
        dtype: of the norm's output, if it differs from the weight's (autocast, or a float32 norm in a float16 model): a
            weight below its smallest normal number would lose bits of the output.

    Returns:
        True if every |weight + weight_offset| is finite and large enough, and every ratio is at most `limit`.

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
    # A comparison with NaN is False, so NaN makes the result False.
    usable = (size >= smallest) & torch.isfinite(size) & (shift <= limit * size)
    return bool(usable.all())


def marks(tensor: Tensor) -> tuple[int, ...] | None:
    """Values that change if a tensor is written to, without reading the tensor or waiting for a device.

    They are the tensor's identity, version counter, address, dtype, and number of aliases, since a write through
    ``tensor.data`` does not change the version counter. A write by a kernel that has only the address is not detected.
    From now on the tensor's aliases are counted. None: an alias exists, and may be used for writing.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> before = marks(weight)
        >>> before == marks(weight), weight.data.zero_().sum().item(), before == marks(weight)
        (True, 0.0, False)
    """
    found = _held(tensor)
    return None if found is None or found[0] != _ALONE else found[1:]


def fingerprint(tensor: Tensor) -> int | None:
    """A number that changes with a tensor's values, also after a write through ``tensor.data``.

    It reads all values, so it is meant for small tensors: the weights of norms, and biases. None: the values cannot be
    read without waiting for a device or making a copy.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> before = fingerprint(weight)
        >>> before == fingerprint(weight), weight.data.zero_().sum().item(), before == fingerprint(weight)
        (True, 0.0, False)
    """
    return _C.fingerprint(tensor)


def leave_hooks(x: Tensor, unpack: Callable[..., Any]) -> None:
    """Records that `x` left the saved-tensor hooks with this unpacking function: its next readers are not under them.

    If `x` is the output of a norm, a reader under the current hooks then counts like a reader under the norm's hooks.

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
    tensor.untyped_storage()  # in new versions Python's handle of the memory counts as a holder once it exists
    return _C.marks(tensor)


_ALONE = (_held(torch.empty(1, device="cpu")) or (1,))[0]
"""Number of holders of the memory of a tensor without aliases."""
