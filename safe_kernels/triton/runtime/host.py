"""What every host function does before it launches: rows of any tensor, the dtype of a product, dropout's numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from safe_kernels.triton.runtime import configs, tuning
from safe_kernels.triton.runtime.launch_replay import launch, may_change, unrecorded

Result = TypeVar("Result")
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
    if torch.backends.cuda.matmul.fp32_precision == "tf32":  # allow_tf32 cannot be read where it was set by this name
        return Product(torch.float32, configs.float32_precision("tf32"))
    exact = all(dtype == torch.float32 for dtype in dtypes)
    return Product(torch.float32, "ieee" if exact else configs.float32_precision("tf32x3"))


def served_by(
    reference: Callable[..., Any], longest: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Sends the calls that no kernel serves to the reference.

    Those are calls with a float64 tensor: it is the dtype of checks, not of training; Triton passes a kernel's numbers
    as float32, and GPUs for training multiply float64 slowly or not at all. And those whose rows are too long.

    Args:
        reference: the formula that serves such a call.
        longest: elements of the longest row of the first argument that a kernel takes; None: any.

    Returns:
        A decorator for host functions.
    """

    def decorate(host: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(host)
        def choose(*args: Any) -> Any:
            is_double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
            is_long = longest is not None and args[0].shape[-1] > longest
            return (reference if is_double or is_long else host)(*args)

        return choose

    return decorate


def tuned(
    kernel: str,
    run: Callable[[configs.Config], Result],
    size: Sequence[int],
    arithmetic: Product,
    matrix: Tensor,
    *flags: str | bool,
) -> Result:
    """Runs a kernel with the table's tiles, or with the fastest where tuning is on.

    Args:
        kernel: its name in `configs.TABLE`.
        run: launches it with a configuration, into results of its own.
        size: of the problem; the rank comes last.
        arithmetic: how to multiply.
        matrix: what the kernel mostly reads.
        flags: what else the kernel is compiled for; False is nothing.

    Returns:
        What `run` returns.
    """
    return run(choose(kernel, run, size, arithmetic, matrix, *flags))


def choose(
    kernel: str,
    run: Callable[[configs.Config], Any],
    size: Sequence[int],
    arithmetic: Product,
    matrix: Tensor,
    *flags: str | bool,
) -> configs.Config:
    """What `tuned` runs a kernel with; the same arguments."""
    tuner = tuning.active()
    if tuner is None:
        return configs.config(kernel, arithmetic.operand, size[-1])

    def offer() -> tuple[str, dict[configs.Config, tuning.Run]]:
        offered = configs.candidates(kernel, arithmetic.operand, size[-1])
        return configs.target().kind, {entry: functools.partial(run, entry) for entry in offered}

    call = (matrix.get_device(), kernel, tuning.bucket(size), matrix.dtype, *arithmetic, *flags)
    with unrecorded():
        choice = tuner.choose(call, offer, matrix)
    if choice is None:
        may_change()
    return choice or configs.config(kernel, arithmetic.operand, size[-1])


def flat(tensor: Tensor) -> Tensor:
    """[..., d] as [M, d], without a copy where strides allow.

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
        rng_state: int64 [2], read on the device; not looked at when nothing is dropped.

    Returns:
        The numbers; `rng_state` is None when nothing is dropped.

    Raises:
        ValueError: something is dropped, and `rng_state` is not of shape [2].
    """
    if dropout_p == 0.0:
        return Dropout(None, 0, 1.0)
    if rng_state is None:
        raise ValueError("rng_state must be an int64 tensor [2] when dropout_p > 0, got None")
    require_shape("rng_state", rng_state, (2,))
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


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses a tensor whose elements a kernel would look for outside of it.

    The checks of the ops stand in C++ above autograd, which inference mode leaves out.

    Args:
        name: of the argument.
        tensor: what came.
        shape: what it has to have.

    Raises:
        ValueError: the shape is another one.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} to fit the other arguments, got {list(tensor.shape)}")


def ceil_div(number: int, divisor: int) -> int:
    """Quotient rounded up.

    Args:
        number: at least 0.
        divisor: at least 1.

    Returns:
        The quotient.
    """
    return -(-number // divisor)


def elementwise(kernel: Any, inputs: list[Tensor], outputs: list[Tensor], drop: Dropout, **constants: Any) -> None:
    """Launches a kernel that computes each element of its outputs from those at the same place in its inputs.

    Args:
        kernel: takes the inputs, the outputs, the random state, M and N, the inputs' strides, and dropout's
            numbers.
        inputs: tensors of one shape, any strides.
        outputs: contiguous tensors of that shape, or empty ones that are not written.
        drop: dropout's numbers.
        constants: further constexprs.
    """
    for tensor in inputs[1:]:
        require_shape("a tensor after the first", tensor, tuple(inputs[0].shape))
    matrices = [flat(tensor) for tensor in inputs]
    M, N = matrices[0].shape
    chosen = configs.elementwise_config(N)
    with guard(inputs[0]):
        launch(
            kernel,
            (ceil_div(M, chosen.block_m) * ceil_div(N, chosen.block_n),),
            *matrices,
            *outputs,
            drop.rng_state,
            M,
            N,
            *(stride for matrix in matrices for stride in matrix.stride()),
            drop.scale,
            drop.threshold,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            HAS_DROPOUT=drop.rng_state is not None,
            **constants,
            **chosen.options,
        )
