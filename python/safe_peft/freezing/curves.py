"""The rise of the threshold from the end of warm-up to its target. Each curve is a registered function.

The default is the cubic curve of SAFE (arXiv 2412.03587):
tau(t) = tau_T * (1 - (1 - (t - t_w) / (t_f - t_w))^3) between the end of warm-up t_w and t_f, then tau_T.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError
from .registry import Registry

Curve = Callable[[int, int, int], float]
"""From (optimizer steps done, step at which warm-up ended, step of the target) to a share of the target, 0 to 1."""
_CURVES = Registry[Curve]("curve")


def register_curve(name: str) -> Callable[[Curve], Curve]:
    """Register a curve under a name for `SafeConfig.curve`.

    Args:
        name: the new curve's name.

    Returns:
        A decorator for a function like `cubic`. The function must return 1.0 from `end` on, and should not decrease.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @register_curve("linear")
        ... def linear(step: int, start: int, end: int) -> float:
        ...     return 1.0 if step >= end else max(0.0, (step - start) / (end - start))
    """
    return _CURVES.adding(name, lambda function: function)


def curve_names() -> list[str]:
    """Return the names of the registered curves."""
    return sorted(_CURVES)


def curve_value(curve: str, step: int, start: int, end: int) -> float:
    """Return a registered curve's share of the target at a step, between the end of warm-up and the target's step."""
    share = _CURVES[curve](step, start, end)
    if not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        raise ConfigError(f"curve {curve!r}: expected a share between 0 and 1 at step {step}, got {share!r}.")
    return share


@register_curve("cubic")
def cubic(step: int, start: int, end: int) -> float:
    """Return the paper's share of the target, in [0, 1]; exactly 1.0 from `end` on.

    Example:
        >>> cubic(150, 100, 200)
        0.875
    """
    if step >= end:
        return 1.0
    if step <= start:
        return 0.0
    return 1.0 - (1.0 - (step - start) / (end - start)) ** 3
