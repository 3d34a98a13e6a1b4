"""Scores of adapters. Each score is a registered function of the evidence about one adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..binding.adapters.score_inputs import ScoreInputs
from ..errors import ConfigError


class Score(NamedTuple):
    """A registered score, and the evidence that it needs."""

    function: Callable[[ScoreInputs], float]
    needs_statistics: bool
    needs_gradients: bool


_SCORES: dict[str, Score] = {}


def register_score(
    name: str, *, needs_statistics: bool = False, needs_gradients: bool = False
) -> Callable[[Callable[[ScoreInputs], float]], Callable[[ScoreInputs], float]]:
    """Register a score under a name for `SafeConfig.score`.

    Args:
        name: the new score's name.
        needs_statistics: the score reads `ScoreInputs.statistics`, which the forwards gather.
        needs_gradients: the score is evaluated before the optimizer's step, when gradients exist.

    Returns:
        A decorator for a function from `ScoreInputs` to importance. Larger is more important; nan means unknown.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @register_score("rank")
        ... def rank(evidence: ScoreInputs) -> float:
        ...     return float(evidence.lora_A().shape[0])
    """
    if name in _SCORES:
        raise ConfigError(f"score {name!r} is already registered; choose another name.")

    def register(function: Callable[[ScoreInputs], float]) -> Callable[[ScoreInputs], float]:
        _SCORES[name] = Score(function, needs_statistics, needs_gradients)
        return function

    return register


def score_names() -> list[str]:
    """Return the names of the registered scores.

    Example:
        >>> "cka" in score_names()
        True
    """
    return sorted(_SCORES)


def find_score(name: str) -> Score:
    """Return the score registered under a name.

    Raises:
        ConfigError: No score has this name.

    Example:
        >>> find_score("cka").needs_statistics
        True
    """
    if name not in _SCORES:
        raise ConfigError(f"score: expected one of {', '.join(score_names())}, got {name!r}.")
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
    A, B, W = evidence.lora_A(), evidence.lora_B(), evidence.base_weight()
    if W is None:
        W = evidence.dequantise()
    if A is None or B is None or W is None:
        return math.nan
    A, B = A.double(), B.double()
    squared = float(((B.mT @ B) * (A @ A.mT)).sum())
    norm = float(torch.linalg.vector_norm(W, dtype=torch.float32))
    return abs(evidence.scaling) * math.sqrt(max(squared, 0.0)) / norm if norm else math.nan


@register_score("gradient_sensitivity", needs_gradients=True)
def gradient_sensitivity(evidence: ScoreInputs) -> float:
    """Mean |parameter x gradient|: the adapter's effect on the loss, to first order (Molchanov et al. 2019)."""
    pairs = ((evidence.lora_A(), evidence.grad_A()), (evidence.lora_B(), evidence.grad_B()))
    known = [(weight, grad) for weight, grad in pairs if weight is not None and grad is not None]
    if not known:
        return math.nan
    total = sum(float((weight * grad).abs().sum(dtype=torch.float32)) for weight, grad in known)
    return total / sum(weight.numel() for weight, _ in known)


@register_score("random")
def random_score(evidence: ScoreInputs) -> float:
    """A number from only the seed and the adapter's place: the control for every claim about freezing."""
    return math.nan if evidence.generator is None else evidence.generator.random()
