"""Checks of arguments that PyTorch's dispatcher accepts and the ops must not; the ops check everything else."""

from __future__ import annotations

from torch import Tensor

from safe_kernels.statistics import AdapterStatistics


def check_number(value: float, name: str) -> None:
    """Raise an error for a tensor that requires grad: the op reads a number from it, and its gradient would be lost.

    Raises:
        TypeError: `value` is a tensor that requires grad.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} must be a number, got a tensor that requires grad, whose gradient would be lost; "
            f"multiply another argument by it, or pass {name}.item()"
        )


def check_statistics(statistics: AdapterStatistics | None) -> None:
    """Raise an error for an argument that is not None and not an `AdapterStatistics`.

    Raises:
        TypeError: `statistics` has another type.
    """
    if statistics is not None and not isinstance(statistics, AdapterStatistics):
        raise TypeError(f"statistics must be an AdapterStatistics or None, got {type(statistics).__name__}")
