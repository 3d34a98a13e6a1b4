"""What every host function does before it launches: rows of any tensor, the dtype of a product, dropout's numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from safe_kernels.triton import configs

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Product(NamedTuple):
    """How matrices are multiplied; products are always summed in float32.

    Attributes:
        operand: dtype that the factors are converted to.
        precision: `input_precision` of tl.dot, which concerns float32 factors alone.
    """

    operand: torch.dtype
    precision: str


def product(*dtypes: torch.dtype) -> Product:
    """Chooses the arithmetic for factors of these dtypes.

    Half-precision factors of one dtype stay what they are. Others become float32: exactly multiplied, unless torch
    allows tf32; if one of them is of half precision, three tf32 products give nearly all of float32's digits.

    Args:
        dtypes: dtypes of the factors.

    Returns:
        The dtype and the precision.
    """
    if len(set(dtypes)) == 1 and torch.float32 not in dtypes:
        return Product(dtypes[0], "ieee")
    if torch.backends.cuda.matmul.allow_tf32:
        return Product(torch.float32, configs.float32_precision("tf32"))
    exact = all(dtype == torch.float32 for dtype in dtypes)
    return Product(torch.float32, "ieee" if exact else configs.float32_precision("tf32x3"))


def float64_by(reference: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Sends calls with a float64 tensor to the reference: it is the dtype of checks, not of training.

    Triton passes a kernel's numbers as float32, and GPUs for training multiply float64 slowly or not at all.

    Args:
        reference: the formula that serves such a call.

    Returns:
        A decorator for host functions.
    """

    def decorate(host: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(host)
        def choose(*args: Any) -> Any:
            is_double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
            return (reference if is_double else host)(*args)

        return choose

    return decorate


def flat(tensor: Tensor) -> Tensor:
    """[..., d] as [N, d], without a copy where strides allow.

    Args:
        tensor: any tensor with a last dimension.

    Returns:
        A matrix.
    """
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


class Dropout(NamedTuple):
    """What a kernel needs to drop: where the random state lies, below which 24 bits it drops, what the rest grow by."""

    rng_state: Tensor | None
    threshold: int
    scale: float


def dropout(dropout_p: float, rng_state: Tensor | None) -> Dropout:
    """Dropout's numbers, as safe_kernels/reference/philox.py defines them.

    Args:
        dropout_p: probability that an element is dropped.
        rng_state: int64 [2], read on the device; None drops nothing.

    Returns:
        The numbers; `rng_state` is None when nothing is dropped.
    """
    if dropout_p == 0.0 or rng_state is None:
        return Dropout(None, 0, 1.0)
    scale = 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)
    return Dropout(rng_state.contiguous(), round(dropout_p * 2**24), scale)


def guard(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device: makes that the tensor's for a while.

    Args:
        tensor: a tensor on the device to launch on.

    Returns:
        A context manager.
    """
    return torch.cuda.device_of(tensor)


def ceil_div(number: int, divisor: int) -> int:
    """Quotient rounded up.

    Args:
        number: at least 0.
        divisor: at least 1.

    Returns:
        The quotient.
    """
    return -(-number // divisor)


def power_of_two(number: int, least: int, most: int) -> int:
    """The width of a tile that covers `number` columns, or as many as fit.

    Args:
        number: columns.
        least: smallest width, a power of two.
        most: largest width, a power of two.

    Returns:
        A power of two in [least, most].
    """
    return min(max(least, 1 << max(number - 1, 0).bit_length()), most)
