"""The data from which one adapter is scored."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...distributed.fsdp import whole

if TYPE_CHECKING:
    from safe_kernels import AdapterStatistics


class Later:
    """A field of `Evidence` that is computed at the first read: most scores read only one or two fields."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def value(self) -> Any:
        """Return the field's value, and compute it at the first call."""
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value


@dataclass(frozen=True)
class Evidence:
    """The data from which one adapter is scored. A score reads the fields that it needs; other fields may be None.

    A tensor that FSDP2 has sharded is gathered when a score reads it, in all processes at the same time. A field may be
    given as `Later`.

    Args:
        statistics: sums over this step's tokens, from its forwards.
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        scaling: the factor of the product B A.
        base_weight: the frozen weight that the adapter is added to, in either orientation; None if it is quantised.
        grad_A: gradient of lora_A before the optimizer step.
        grad_B: gradient of lora_B before the optimizer step.
        generator: seeded for this adapter only, and independent of every global generator.
        dequantise: for a quantised base weight, a function that computes the weight, or None if that is impossible. The
            function is slow; call it only in a score that needs the weight.
    """

    statistics: AdapterStatistics | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    base_weight: Tensor | None = None
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None
    generator: random.Random | None = None
    dequantise: Callable[[], Tensor | None] | None = None

    def __getattribute__(self, name: str) -> Any:
        """Return a field's value, gathered: torch's functions would take the sum of a shard for that of the tensor."""
        value = super().__getattribute__(name)
        if type(value) is Later:
            value = value.value()
        return whole(value) if isinstance(value, Tensor) else value
