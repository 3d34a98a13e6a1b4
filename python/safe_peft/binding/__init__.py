"""Puts the fast path under a PEFT model in place, explains which path each layer takes, and removes the fast path.

The names that extensions need are here. They are imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Adapter, Evidence, ScoreInputs, register_adapter

__all__ = ["Adapter", "Evidence", "ScoreInputs", "register_adapter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".adapters", __name__), name)
