"""Checks of arguments that PyTorch's dispatcher accepts and the ops must not, and the call of an op that can score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from safe_kernels.functional.random import state_of_call
from safe_kernels.statistics import AdapterStatistics


def check_number(value: float, name: str) -> None:
    """Raise TypeError for a tensor that requires grad: the op reads a number, and the gradient would be lost."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} must be a number, got a tensor that requires grad, whose gradient would be lost; "
            f"multiply another argument by it, or pass {name}.item()"
        )


def call_adapter(
    op: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    statistics: AdapterStatistics | None,
) -> Tensor:
    """Call an op with an adapter, whose first tensor is dropped out, and add its sums to the statistics."""
    check_number(scaling, "scaling")
    arguments = (*tensors, scaling, dropout_p, state_of_call(tensors[0], dropout_p, rng_state))
    return call_scored(op, arguments, statistics)


def call_scored(op: Callable[..., Any], arguments: tuple[Any, ...], statistics: AdapterStatistics | None) -> Tensor:
    """Call an op whose last result is the sums of the scored rows, add these to the statistics, and return the first.

    `arguments` are the op's arguments without the scored rows, which are the last ones.
    """
    if statistics is not None and not isinstance(statistics, AdapterStatistics):
        raise TypeError(f"statistics must be an AdapterStatistics or None, got {type(statistics).__name__}")
    if statistics is None or statistics.blocks is None:
        return op(*arguments)[0]
    blocks = statistics.blocks
    results = op(*arguments, blocks.starts, blocks.block_rows, blocks.row_weight)
    statistics.add_(results[-1])
    return results[0]
