"""The data from which one adapter is scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...distributed.fsdp import whole

if TYPE_CHECKING:
    from safe_kernels import AdapterStatistics

Source = Tensor | Callable[[], Tensor | None] | None
StateSource = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None
History = Iterable[tuple[int, float]]


@dataclass
class OptimizerStep:
    """What the optimizer did to the parameters in one scoring step, for `ScoreInputs`.

    Args:
        optimizers: the optimizers that train the parameters.
        before: by parameter, its value and its gradient before the optimizer's step, if the score needs the update.
    """

    optimizers: Sequence[Any] = ()
    before: Mapping[Tensor, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def grad(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's gradient before the step: an optimizer may change `parameter.grad` in place."""
        return self.before[parameter][1] if parameter in self.before else parameter.grad

    def update(self, parameter: Tensor) -> Tensor | None:
        """Return what the step added to a parameter; None if no copy from before the step exists."""
        return parameter.detach() - self.before[parameter][0] if parameter in self.before else None

    def state(self, parameter: Tensor) -> Mapping[str, Any]:
        """Return the optimizer's state of a parameter; {} if there is none."""
        states = (getattr(optimizer, "state", {}) for optimizer in self.optimizers)
        return next((state[parameter] for state in states if parameter in state), {})


class ScoreInputs:
    """The data about one adapter when it is scored. A score calls the methods that it needs; each may return None.

    FSDP2 and tensor parallelism shard tensors. A method gathers its tensor, and every process must call it. So a score
    must call the same methods for every adapter, independent of the values.

    Args:
        statistics: sums over this step's rows, gathered during its forwards.
        lora_A: [r, d_in]. This and the other tensors may also be functions that return the tensor.
        lora_B: [d_out, r].
        scaling: the factor of the product.
        base_weight: the frozen weight of the layer, in either orientation; None if it is quantised.
        grad_A, grad_B: the gradients before the optimizer's step.
        generator: a generator of this adapter, independent of every global generator.
        dequantise: the dequantised base weight; None if the package cannot compute it.
        update_A, update_B: what the optimizer's step added to the matrices.
        optimizer_state_A, optimizer_state_B: the optimizer's states of the matrices, or functions that return them.
        optimizer: filled by the scorer; the sources of gradients, updates and states may read it.
        step: the optimizer step that is scored; the first one is 1.
        memory: the score may write numbers here, and reads them in the next scoring step. They are in the saved state.
        history: the adapter's earlier scoring steps, or a function that returns them: the attribute `past`.

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
        update_A: Source = None,
        update_B: Source = None,
        optimizer_state_A: StateSource = None,
        optimizer_state_B: StateSource = None,
        optimizer: OptimizerStep | None = None,
        step: int = 0,
        memory: dict[str, float] | None = None,
        history: History | Callable[[], History] = (),
    ) -> None:
        self.statistics, self.scaling, self.generator, self.grad_scale = statistics, scaling, generator, 1.0
        self._lora_A, self._lora_B = lora_A, lora_B
        self._grad_A, self._grad_B = grad_A, grad_B
        self._base_weight, self._dequantise = base_weight, dequantise
        self._update_A, self._update_B = update_A, update_B
        self._state_A, self._state_B = optimizer_state_A, optimizer_state_B
        self.optimizer = OptimizerStep() if optimizer is None else optimizer
        self.step, self.memory, self.past = step, {} if memory is None else memory, history

    @property
    def history(self) -> tuple[tuple[int, float], ...]:
        """The adapter's earlier scoring steps: pairs of (optimizer step, importance)."""
        return tuple(self.past() if callable(self.past) else self.past)

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
        """Return the dequantised base weight; every call dequantises it, which is costly."""
        return _made(self._dequantise)

    def update_A(self) -> Tensor | None:
        """Return what the optimizer's step added to lora_A, whole; a score with `needs_update` may call it."""
        return _made(self._update_A)

    def update_B(self) -> Tensor | None:
        """Return what the optimizer's step added to lora_B, whole; a score with `needs_update` may call it."""
        return _made(self._update_B)

    def optimizer_state_A(self) -> dict[str, Any]:
        """Return the optimizer's state of lora_A, its tensors whole; {} if there is none."""
        return _made_state(self._state_A)

    def optimizer_state_B(self) -> dict[str, Any]:
        """Return the optimizer's state of lora_B, its tensors whole; {} if there is none."""
        return _made_state(self._state_B)

    def _unscaled(self, grad: Tensor | None) -> Tensor | None:
        return grad if grad is None or self.grad_scale == 1.0 else grad.float() / self.grad_scale


def _made(source: Source) -> Tensor | None:
    """Torch's own functions would treat the sum over a shard as the sum over the tensor."""
    tensor = source if source is None or isinstance(source, Tensor) else source()
    return None if tensor is None else whole(tensor)


def _made_state(source: StateSource) -> dict[str, Any]:
    state = source() if callable(source) else source or {}
    return {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}


Evidence = ScoreInputs  # the old name
