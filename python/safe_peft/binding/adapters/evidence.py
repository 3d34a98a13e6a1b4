"""What is known about one adapter when it is scored."""

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
    """A field of `Evidence` that is made when it is first read: a score reads one or two, of hundreds of adapters."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def value(self) -> Any:
        """The field."""
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value


@dataclass(frozen=True)
class Evidence:
    """What is known about one adapter when it is scored; a score reads what it needs, the rest may be None.

    A tensor that FSDP2 has spread over processes is put together when it is read, in all of them, and not before. A
    field may be given as `Later`.

    Args:
        statistics: sums over this step's rows, gathered during its forwards.
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        scaling: what the product is multiplied by.
        base_weight: the frozen weight that the adapter is added to, in either orientation; None where it is quantised.
        grad_A: gradient of lora_A before the optimizer's step.
        grad_B: gradient of lora_B before the optimizer's step.
        generator: seeded for this adapter alone, and independent of every global generator.
        dequantise: where the base weight is quantised, makes it anew, or None where that cannot be done; costly, so
            for the scores that need it.
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
        """A field's value; torch's own functions would take a shard's sum for the whole tensor's."""
        value = super().__getattribute__(name)
        if type(value) is Later:
            value = value.value()
        return whole(value) if isinstance(value, Tensor) else value
