"""What the dispatcher would take without a word, and should not; everything else the ops refuse themselves."""

from __future__ import annotations

from torch import Tensor

from safe_kernels.statistics import AdapterStatistics


def check_number(value: float, name: str) -> None:
    """Refuses a tensor that trains where a number is read from it: its gradient would be lost.

    Raises:
        TypeError: it is one.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} must be a number, got a tensor that requires grad, whose gradient would be lost; "
            f"multiply another argument by it, or pass {name}.item()"
        )


def check_statistics(statistics: AdapterStatistics | None) -> None:
    """Refuses what is no `AdapterStatistics`.

    Raises:
        TypeError: it is something else.
    """
    if statistics is not None and not isinstance(statistics, AdapterStatistics):
        raise TypeError(f"statistics must be an AdapterStatistics or None, got {type(statistics).__name__}")
