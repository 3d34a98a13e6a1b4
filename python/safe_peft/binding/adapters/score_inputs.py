"""The data from which one adapter is scored."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ...distributed.fsdp import whole

if TYPE_CHECKING:
    from safe_kernels import AdapterStatistics

Source = Tensor | Callable[[], Tensor | None] | None


class ScoreInputs:
    """The data about one adapter when it is scored. A score calls the methods that it needs; each may return None.

    FSDP2 and tensor parallelism shard tensors. A method gathers its tensor, and every process must call it. So a score
    must call the same methods for every adapter, whatever the values are.

    Args:
        statistics: sums over this step's rows, gathered during its forwards.
        lora_A: [r, d_in]. This and the other tensors may also be functions that return the tensor.
        lora_B: [d_out, r].
        scaling: the factor of the product.
        base_weight: the frozen weight of the layer, in either orientation; None if it is quantised.
        grad_A: gradient of lora_A before the optimizer's step.
        grad_B: gradient of lora_B before the optimizer's step.
        generator: a generator of this adapter, independent of every global generator.
        dequantise: the dequantised base weight; None if the package cannot compute it.

    Attributes:
        grad_scale: the factor by which a GradScaler has multiplied the gradients.

    Example:
        >>> import torch
        >>> evidence = ScoreInputs(lora_A=torch.ones(2, 8), lora_B=lambda: torch.zeros(4, 2))
        >>> evidence.lora_A().shape, evidence.lora_B().shape, evidence.base_weight()
        (torch.Size([2, 8]), torch.Size([4, 2]), None)
    """

    def __init__(
        self,
        statistics: AdapterStatistics | None = None,
        lora_A: Source = None,
        lora_B: Source = None,
        scaling: float = 1.0,
        base_weight: Source = None,
        grad_A: Source = None,
        grad_B: Source = None,
        generator: random.Random | None = None,
        dequantise: Source = None,
    ) -> None:
        self.statistics, self.scaling, self.generator = statistics, scaling, generator
        self.grad_scale = 1.0
        self._lora_A, self._lora_B = lora_A, lora_B
        self._grad_A, self._grad_B = grad_A, grad_B
        self._base_weight, self._dequantise = base_weight, dequantise

    def lora_A(self) -> Tensor | None:
        """Return lora_A, whole."""
        return _made(self._lora_A)

    def lora_B(self) -> Tensor | None:
        """Return lora_B, whole."""
        return _made(self._lora_B)

    def grad_A(self) -> Tensor | None:
        """Return the gradient of lora_A, whole and unscaled."""
        return self._unscaled(_made(self._grad_A))

    def grad_B(self) -> Tensor | None:
        """Return the gradient of lora_B, whole and unscaled."""
        return self._unscaled(_made(self._grad_B))

    def base_weight(self) -> Tensor | None:
        """Return the base layer's weight, whole, as it is stored."""
        return _made(self._base_weight)

    def dequantise(self) -> Tensor | None:
        """Return the weight that a quantised base layer stands for; every call makes it anew, which is costly."""
        return _made(self._dequantise)

    def _unscaled(self, grad: Tensor | None) -> Tensor | None:
        return grad if grad is None or self.grad_scale == 1.0 else grad.float() / self.grad_scale


def _made(source: Source) -> Tensor | None:
    """Torch's own functions would take a shard's sum for the whole tensor's."""
    tensor = source if source is None or isinstance(source, Tensor) else source()
    return None if tensor is None else whole(tensor)


Evidence = ScoreInputs  # the old name
