"""Makes Triton's interpreter compute with bfloat16 and tf32 as a GPU does.

The interpreter keeps bfloat16 as uint16 and, left alone, computes with those integers, truncates where a GPU rounds to
nearest, and multiplies tf32 factors exactly. Here bfloat16 is computed in float32 and rounded, as the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The numbers that bfloat16 patterns stand for."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(bits.shape)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Bfloat16 patterns, rounded to nearest, ties to even."""
    exact = np.ascontiguousarray(np.asarray(numbers, dtype=np.float32))
    bits = exact.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(exact), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(numbers))


def to_tf32(numbers: np.ndarray) -> np.ndarray:
    """Float32 with 10 bits of mantissa, rounded to nearest, ties away from zero."""
    bits = np.ascontiguousarray(numbers).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x1000) & np.uint64(0xFFFFE000)
    return kept.astype(np.uint32).view(np.float32).reshape(numbers.shape)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def numbers_of(handle: TensorHandle) -> np.ndarray:
    """What a handle's elements are as numbers."""
    return from_bf16(handle.data) if is_bf16(handle) and handle.data.dtype == np.uint16 else handle.data


def rounded(numbers: np.ndarray) -> TensorHandle:
    return TensorHandle(to_bf16(numbers), tl.bfloat16)


def replace(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts `make(what was there)` in the place of a method."""
    setattr(owner, name, make(getattr(owner, name)))


def casting(before: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: TensorHandle, target: Any, *rounding: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return rounded(source.data.astype(np.float32))
        if is_bf16(source) and target.scalar != tl.bfloat16:
            return TensorHandle(numbers_of(source).astype(interpreter._get_np_dtype(target)), target.scalar)
        return before(self, source, target, *rounding)

    return cast


def one_operand(before: Callable[..., Any]) -> Callable[..., Any]:
    def unary(self: Any, value: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        return rounded(op(numbers_of(value))) if is_bf16(value) else before(self, value, op)

    return unary


def two_operands(before: Callable[..., Any]) -> Callable[..., Any]:
    def binary(self: Any, left: TensorHandle, right: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not is_bf16(left):
            return before(self, left, right, op)
        result = op(numbers_of(left), numbers_of(right))
        return TensorHandle(result, tl.int1) if result.dtype == bool else rounded(result)

    return binary


def three_operands(before: Callable[..., Any]) -> Callable[..., Any]:
    def ternary(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not is_bf16(c) or op is np.where:  # a choice moves patterns as they are
            return before(self, a, b, c, op)
        return rounded(op(numbers_of(a), numbers_of(b), numbers_of(c)))

    return ternary


def fused(before: Callable[..., Any]) -> Callable[..., Any]:
    def fma(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle) -> TensorHandle:
        return rounded(numbers_of(a) * numbers_of(b) + numbers_of(c)) if is_bf16(c) else before(self, a, b, c)

    return fma


def multiplying(before: Callable[..., Any]) -> Callable[..., Any]:
    def factor(handle: TensorHandle, precision: str) -> TensorHandle:
        if is_bf16(handle):
            return TensorHandle(numbers_of(handle), tl.float32)
        single = handle.dtype.scalar == tl.float32 and "TF32" in precision and "x3" not in precision
        return TensorHandle(to_tf32(handle.data), tl.float32) if single else handle

    def dot(self: Any, a: TensorHandle, b: TensorHandle, start: TensorHandle, precision: Any, most: Any) -> Any:
        return before(self, factor(a, str(precision)), factor(b, str(precision)), start, precision, most)

    return dot


def summing(before: Callable[..., Any]) -> Callable[..., Any]:
    def total(self: Any, values: Any) -> Any:
        if values.dtype.scalar != tl.bfloat16:
            return before(self, values)
        result = to_bf16(np.sum(numbers_of(values.handle), axis=self.axis, keepdims=self.keep_dims))
        shape = list(result.shape)
        kind = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
        return tl.core.tensor(TensorHandle(result if shape else result.reshape(1), tl.bfloat16), kind)

    return total


def indexing(before: Callable[..., Any]) -> Callable[..., Any]:
    """numpy 2.4 no longer takes an array of one element for a number, as Triton 3.6's loops over tensors ask it to."""

    def patch(tensor: type, *scope: Any) -> None:
        before(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        for name in ("__index__", "__int__"):
            set_attribute(tensor, name, lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    return patch


def install() -> None:
    """Patches the interpreter of this process."""
    for name, make in {
        "cast_impl": casting,
        "create_fp_to_fp": casting,
        "unary_op": one_operand,
        "binary_op": two_operands,
        "ternary_op": three_operands,
        "create_fma": fused,
        "create_dot": multiplying,
    }.items():
        replace(InterpreterBuilder, name, make)
    InterpreterBuilder.get_bf16 = lambda self, value: rounded(np.array([value], np.float32))
    replace(ReduceOps, "sum", summing)
    interpreter._patch_lang_tensor = indexing(interpreter._patch_lang_tensor)
