"""Adapters whose score is not finite: they never freeze, a warning names them, and training can be stopped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch

from ..binding.adapters import ScoreInputs
from ..errors import ScoreError

logger = logging.getLogger(__name__)


def broken_parts(evidence: ScoreInputs) -> tuple[str, ...]:
    """Name the parts of an adapter's evidence that hold NaN or Inf; if there are none, the score had no evidence.

    Example:
        >>> broken_parts(ScoreInputs(lora_B=torch.tensor([[float("inf")]])))
        ('lora_B',)
    """
    sums = None if evidence.statistics is None else evidence.statistics.sums
    parts = {
        "activations": sums,
        "lora_A": evidence.lora_A(),
        "lora_B": evidence.lora_B(),
        "the gradient of lora_A": evidence.grad_A(),
        "the gradient of lora_B": evidence.grad_B(),
        "the base weight": evidence.base_weight(),
    }
    tensors = {name: tensor for name, tensor in parts.items() if tensor is not None and tensor.is_floating_point()}
    return tuple(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))


class NonFinite:
    """Warns once about each adapter without a finite score, or stops the training at NaN and Inf."""

    def __init__(self, *, raises: bool) -> None:
        self._raises = raises
        self._postponed = False
        self._told: set[tuple[str, bool]] = set()

    def note(
        self, step: int, importance: Mapping[str, float], broken: Mapping[str, tuple[str, ...]]
    ) -> ScoreError | None:
        """Return the error to raise at the end of a scoring step, if any; `broken` names parts with NaN or Inf."""
        unknown = [name for name, value in importance.items() if not math.isfinite(value) and name not in broken]
        if new := self._new(unknown, False):
            why = (
                "%d adapters have no finite importance at step %d and stay trainable: %s. Usual causes: no forward in "
                "training mode (call model.train()), or a score that cannot be computed for these layers."
            )
            logger.warning(why, len(new), step, _some(new))
        if not broken:
            return None
        *most, last = sorted({part for found in broken.values() for part in found})
        parts = f"{', '.join(most)} and {last}" if most else last
        what = f"{len(broken)} adapters have a score that is not finite at step {step}: NaN or Inf in {parts}"
        fix = "lower the learning rate, clip gradients, or look for broken rows"
        if self._raises:
            return ScoreError(
                f"{what} of {_some(list(broken))}; {fix}. The freezer stays usable; with on_nonfinite='warn' training "
                "continues, and these adapters do not freeze."
            )
        if new := self._new(broken, True):
            why = "%s of %s, which stay trainable; %s, or set on_nonfinite='raise' to stop the training."
            logger.warning(why, what, _some(new), fix)
        return None

    def note_postponed(self, step: int) -> None:
        """Log once that a scoring step had no gradients."""
        if not self._postponed:
            self._postponed = True
            why = "step %d: the optimizer skipped its step (GradScaler does so if gradients are infinite), so there "
            logger.warning(why + "are no gradients to score; the next optimizer step is scored instead.", step)

    def _new(self, names: Iterable[str], is_broken: bool) -> list[str]:
        new = [name for name in names if (name, is_broken) not in self._told]
        self._told.update((name, is_broken) for name in new)
        return new


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
