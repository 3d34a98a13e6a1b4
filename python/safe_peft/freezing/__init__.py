"""The SAFE method: score adapters, schedule, decide, freeze, and save the state.

The functions for extensions are importable from here; each is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .curves import register_curve
    from .policies import PolicyInputs, register_policy
    from .scores import register_score

__all__ = ["PolicyInputs", "register_curve", "register_policy", "register_score"]

_LAZY = {
    "PolicyInputs": "policies",
    "register_curve": "curves",
    "register_policy": "policies",
    "register_score": "scores",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
