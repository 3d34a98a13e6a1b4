"""Scores of adapters. Each score is a registered function of the evidence about one adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..binding.adapters.score_inputs import ScoreInputs
from ..errors import ConfigError
from .registry import Registry

Function = Callable[[ScoreInputs], float]


class Score(NamedTuple):
    """A registered score, and the evidence that it needs."""

    function: Function
    needs_statistics: bool
    needs_gradients: bool
    needs_update: bool = False

    @property
    def by_optimizer(self) -> bool:
        """Whether the score is computed around the optimizer's step, and not after it."""
        return self.needs_gradients or self.needs_update


_SCORES = Registry[Score]("score")


def register_score(
    name: str, *, needs_statistics: bool = False, needs_gradients: bool = False, needs_update: bool = False
) -> Callable[[Function], Function]:
    """Register a score under a name for `SafeConfig.score`.

    Args:
        name: the new score's name.
        needs_statistics: the score reads `ScoreInputs.statistics`, which the forwards gather.
        needs_gradients: the score is evaluated before the optimizer's step, when gradients exist.
        needs_update: the score is evaluated right after the optimizer's step. It may read `update_A`, `update_B`, and
            the gradients from before the step. Both are copied in a scoring step only, and dropped after it.

    Returns:
        A decorator for a function from `ScoreInputs` to importance. Larger is more important; nan means unknown.

    Raises:
        ConfigError: The name is taken, or the score needs statistics and the update, which never exist together.

    Example:
        >>> @register_score("rank")
        ... def rank(evidence: ScoreInputs) -> float:
        ...     return float(evidence.lora_A().shape[0])
    """
    if needs_statistics and needs_update:
        raise ConfigError(f"score {name!r}: choose needs_statistics or needs_update, a score cannot have both.")
    return _SCORES.adding(name, lambda function: Score(function, needs_statistics, needs_gradients, needs_update))


def score_names() -> list[str]:
    """Return the names of the registered scores."""
    return sorted(_SCORES)


def find_score(name: str) -> Score:
    """Return the score registered under a name."""
    return _SCORES[name]


@register_score("cka", needs_statistics=True)
def cka(evidence: ScoreInputs) -> float:
    """1 - CKA between the layer's features without the adapter and with it: the method's own score."""
    return math.nan if evidence.statistics is None else evidence.statistics.one_minus_cka()


@register_score("relative_norm")
def relative_norm(evidence: ScoreInputs) -> float:
    """|s B A| / |W|, Frobenius: how much the adapter changes the weight.

    B A is never formed: |B A|^2 = trace(A' B' B A) is the sum over the elementwise product of two r x r Gram matrices.
    """
    A, B, norm = evidence.lora_A(), evidence.lora_B(), _base_norm(evidence)
    if A is None or B is None or not norm:
        return math.nan
    return abs(evidence.scaling) * _product_norm(B.double(), A.double()) / norm


@register_score("gradient_sensitivity", needs_gradients=True)
def gradient_sensitivity(evidence: ScoreInputs) -> float:
    """Mean |parameter x gradient|: the adapter's effect on the loss, to first order (Molchanov et al. 2019)."""
    pairs = ((evidence.lora_A(), evidence.grad_A()), (evidence.lora_B(), evidence.grad_B()))
    known = [(weight, grad) for weight, grad in pairs if weight is not None and grad is not None]
    if not known:
        return math.nan
    total = sum(float((weight * grad).abs().sum(dtype=torch.float32)) for weight, grad in known)
    return total / sum(weight.numel() for weight, _ in known)


@register_score("velocity", needs_statistics=True)
def velocity(evidence: ScoreInputs) -> float:
    """How fast the adapter's effect on its layer still changes; small means that the adapter has converged.

    v(t) = |sqrt(c(t)) - sqrt(c(t - D))| / D with c = 1 - CKA and D optimizer steps between the two scoring steps; the
    importance is the running mean .5 v(t) + .5 v(t - D). The root grows with the size of the change. Egeria (Wang et
    al. 2023, arXiv 2201.06227) also freezes layers that have stopped changing, with a reference model.

    In the first scoring step there is no earlier value, so the importance is nan.
    """
    memory, changed = evidence.memory, cka(evidence)
    if math.isnan(changed):
        return math.nan
    root, step = math.sqrt(max(changed, 0.0)), evidence.step
    if "root" in memory:
        _running(memory, "velocity", abs(root - memory["root"]) / max(1, step - memory["step"]), 0.5)
    memory |= {"root": root, "step": step}
    return memory.get("velocity", math.nan)


@register_score("drift", needs_update=True)
def drift(evidence: ScoreInputs) -> float:
    """|s (B A - B' A')| / |W|, Frobenius: how far the last optimizer step moved the layer's weight.

    A' and B' are from before the step, dA and dB its update. B A - B' A' = [B dB] [dA; A'], so its norm comes from two
    2r x 2r Gram matrices, as in `relative_norm`, and without the difference of two products that are nearly equal.
    """
    parts = evidence.lora_A(), evidence.lora_B(), evidence.update_A(), evidence.update_B()
    A, B, dA, dB = (None if part is None else part.double() for part in parts)
    norm = _base_norm(evidence)
    if A is None or B is None or dA is None or dB is None or not norm:
        return math.nan
    return abs(evidence.scaling) * _product_norm(torch.cat([B, dB], -1), torch.cat([dA, A - dA], -2)) / norm


@register_score("sensitivity", needs_gradients=True)
def sensitivity(evidence: ScoreInputs) -> float:
    """`gradient_sensitivity`, smoothed over scoring steps, times its smoothed uncertainty.

    I is the mean of |parameter x gradient|; E = .85 E + .15 I, U = .85 U + .15 |I - E|, importance = E U. This is
    AdaLoRA's smoothing (Zhang et al. 2023, arXiv 2303.10512) for a whole adapter instead of a weight. Both running
    means start at zero, as in its code.
    """
    memory, now = evidence.memory, gradient_sensitivity(evidence)
    if not math.isfinite(now):
        return math.nan
    memory.setdefault("mean", 0.0)
    memory.setdefault("spread", 0.0)
    mean = _running(memory, "mean", now, 0.85)
    return mean * _running(memory, "spread", abs(now - mean), 0.85)


@register_score("progress")
def progress(evidence: ScoreInputs) -> float:
    """Loss that Adam's next steps will still remove, from its moments: the part of the gradient that is not noise.

    The sum of max(0, m^2 - k v) / (sqrt(v) + 1e-8), m and v Adam's `exp_avg` and `exp_avg_sq`. A step of Adam is
    proportional to m / sqrt(v), and it removes loss in proportion to its product with m. If gradients are only noise,
    the mean of m^2 is k v, k = (1 - .9) / (1 + .9) = .053 with Adam's first beta. The moments are used as they are
    stored, not corrected for their start at zero: early in training v is too small, and less noise is taken off.

    nan if the optimizer has no such state: SGD, Adafactor, Lion, and 8-bit, 4-bit and fp8 variants of Adam, which
    store codes instead of numbers.
    """
    states = evidence.optimizer_state_A(), evidence.optimizer_state_B()
    moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in states if {"exp_avg", "exp_avg_sq"} <= state.keys()]
    if not moments or any(type(one) is not Tensor or not one.is_floating_point() for pair in moments for one in pair):
        return math.nan
    pairs = [(m.double(), v.double()) for m, v in moments]
    return sum(float(((m**2 - 0.053 * v).clamp(min=0) / (v.sqrt() + 1e-8)).sum()) for m, v in pairs)


@register_score("realised", needs_update=True)
def realised(evidence: ScoreInputs) -> float:
    """Loss that the adapter's latest updates removed, to first order; below zero if they added loss.

    The running mean (.5) of -g (w(t + 1) - w(t)), summed over the adapter's parameters, g the gradient before the
    step: loss change allocation (Lan et al. 2019, arXiv 1909.01440).
    """
    pairs = ((evidence.grad_A(), evidence.update_A()), (evidence.grad_B(), evidence.update_B()))
    known = [(grad, update) for grad, update in pairs if grad is not None and update is not None]
    removed = -sum(float((grad.double() * update.double()).sum()) for grad, update in known)
    return _running(evidence.memory, "removed", removed, 0.5) if known and math.isfinite(removed) else math.nan


@register_score("random")
def random_score(evidence: ScoreInputs) -> float:
    """A number that depends only on the seed and the adapter's place: the control for every claim about freezing."""
    return math.nan if evidence.generator is None else evidence.generator.random()


def _base_norm(evidence: ScoreInputs) -> float | None:
    """Return the norm of the base weight; None if the weight is unknown."""
    W = evidence.base_weight()
    W = evidence.dequantise() if W is None else W
    return None if W is None else float(torch.linalg.vector_norm(W, dtype=torch.promote_types(W.dtype, torch.float32)))


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Return the Frobenius norm of left @ right without forming it."""
    return math.sqrt(max(float(((left.mT @ left) * (right @ right.mT)).sum()), 0.0))


def _running(memory: dict[str, float], name: str, value: float, keep: float) -> float:
    """Update a running mean in a score's memory; the first value starts it."""
    memory[name] = keep * memory[name] + (1 - keep) * value if name in memory else value
    return memory[name]
