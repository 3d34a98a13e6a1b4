"""Shared steps of host functions before a launch: flat rows, the dtype of a product, dropout's numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels.reference.philox import dropout_scale, dropout_threshold
from safe_kernels.triton.runtime import configs, tuning
from safe_kernels.triton.runtime.launch_replay import launch, may_change, unrecorded

Result = TypeVar("Result")
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Product(NamedTuple):
    """How matrices are multiplied. Products are always summed in float32."""

    operand: torch.dtype  # to which the factors are converted
    precision: str  # `input_precision` of tl.dot, which affects only float32 factors; or "terms" (lib/terms.py)

    @property
    def has_terms(self) -> bool:
        """Whether a narrow factor is float32, and split into three terms."""
        return self.precision == "terms"

    @property
    def narrow(self) -> torch.dtype:
        """The dtype of a narrow factor in memory."""
        return torch.float32 if self.has_terms else self.operand


def product(*dtypes: torch.dtype) -> Product:
    """The arithmetic for factors of these dtypes.

    Half-precision factors of one dtype keep it. Others become float32 and are multiplied exactly, unless torch allows
    tf32. If one of them has half precision, three tf32 products give almost the precision of float32.
    """
    if len(set(dtypes)) == 1 and torch.float32 not in dtypes:
        return Product(dtypes[0], "ieee")
    if torch.backends.cuda.matmul.fp32_precision == "tf32":  # allow_tf32 cannot be read if this name was set
        return Product(torch.float32, configs.float32_precision("tf32"))
    exact = all(dtype == torch.float32 for dtype in dtypes)
    return Product(torch.float32, "ieee" if exact else configs.float32_precision("tf32x3"))


def adapter_product(kernel: str, matrix: torch.dtype, narrow: torch.dtype, rank: int) -> Product:
    """The arithmetic of a kernel for a large matrix and an adapter's factor: three terms of the factor, or `product`.

    Terms are for a float32 factor and a bfloat16 matrix, which stays as it is. A float16 number has more bits than a
    bfloat16 one. Terms are more exact than tf32, so they also serve where torch allows tf32.
    """
    if (matrix, narrow) == (torch.bfloat16, torch.float32) and configs.has_terms(kernel, rank):
        return Product(matrix, "terms")
    return product(matrix, narrow)


def served_by(
    reference: Callable[..., Any], longest: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Sends calls that no kernel supports to the reference: those with rows over `longest`, or with a float64 tensor.

    float64 is a dtype for checks, not for training. Triton passes a kernel's numbers as float32, and GPUs for training
    multiply float64 slowly or not at all.
    """

    def decorate(host: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(host)
        def choose(*args: Any) -> Any:
            is_double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
            is_long = longest is not None and args[0].shape[-1] > longest
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device
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
    """Runs a kernel with the table's tiles, or with the fastest ones if tuning is on.

    Args:
        kernel: its name in `configs.TABLE`.
        run: launches the kernel with a configuration, and allocates its results.
        size: of the problem: rows, columns and the rank, which is last.
        arithmetic: how to multiply.
        matrix: the largest tensor that the kernel reads.
        flags: further properties of the compiled kernel; False is ignored.
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
    """The configuration that `tuned` would use; same arguments."""
    tuner, wanted = tuning.active(), (kernel, arithmetic.operand, size[-1], arithmetic.has_terms, size[1])
    if tuner is None:
        return configs.config(*wanted)

    def offer() -> tuple[str, dict[configs.Config, tuning.Run]]:
        offered = configs.candidates(*wanted)
        return configs.target().kind, {entry: functools.partial(run, entry) for entry in offered}

    call = (matrix.get_device(), kernel, tuning.bucket(size), matrix.dtype, *arithmetic, *flags)
    with unrecorded():
        choice = tuner.choose(call, offer, matrix)
    if choice is None:
        may_change()
    return choice or configs.config(*wanted)


def flat(tensor: Tensor) -> Tensor:
    """[..., d] as [M, d], without a copy if the strides allow it."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


class Dropout(NamedTuple):
    """Dropout in a kernel: the random state, the threshold below which 16 random bits drop, the scale of the rest."""

    rng_state: Tensor | None
    threshold: int
    scale: float


def dropout(dropout_p: float, rng_state: Tensor | None) -> Dropout:
    """Dropout's numbers, as safe_kernels/reference/philox.py defines them. The random state is read on the device."""
    if dropout_p == 0.0:
        return Dropout(None, 0, 1.0)
    if rng_state is None:
        raise ValueError("rng_state must be an int64 tensor [2] when dropout_p > 0, got None")
    require_shape("rng_state", rng_state, (2,))
    threshold = dropout_threshold(dropout_p)
    return Dropout(rng_state.contiguous() if threshold else None, threshold, dropout_scale(dropout_p))


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape, because a kernel would read outside of it.

    The ops' own checks are in the C++ autograd kernels, which inference mode skips.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} to fit the other arguments, got {list(tensor.shape)}")


def elementwise(
    kernel: Any, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], drop: Dropout, **constants: Any
) -> None:
    """Launches a kernel that computes each output element from the input elements at the same position.

    The kernel's arguments are the inputs (of one shape, any strides, or None after the first), the contiguous outputs
    (empty if unwanted), the random state, M and N, the inputs' strides, and dropout's numbers.
    """
    given = [tensor for tensor in inputs if tensor is not None]
    for tensor in given[1:]:
        require_shape("a tensor after the first", tensor, tuple(given[0].shape))
    matrices = [None if tensor is None else flat(tensor) for tensor in inputs]
    M, N = flat(given[0]).shape
    chosen = configs.elementwise_config(N)
    launch(
        kernel,
        (triton.cdiv(M, chosen.block_m) * triton.cdiv(N, chosen.block_n),),
        *matrices,
        *outputs,
        drop.rng_state,
        M,
        N,
        *(stride for matrix in matrices for stride in ((1, 1) if matrix is None else matrix.stride())),
        drop.scale,
        drop.threshold,
        HAS_DROPOUT=drop.rng_state is not None,
        **constants,
        **chosen.constants,
    )
