"""SAFE, Selective Adapter FrEezing (arXiv 2412.03587), for PEFT models, on kernels that retain only what they need."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import AssetError, BindingError, ConfigError, PlanError, SafeError, ScoreError, StateError

# Bound before anything can import the module of the same name, which would else take the function's place here.
from .explain import explain

if TYPE_CHECKING:
    from .binding import Binding, bind
    from .callback import SafeCallback
    from .checkpoints import last_checkpoint
    from .config import SafeConfig
    from .freezer import AdapterFreezer
    from .loss import chunked_loss
    from .planning.memory import MemoryPlan, plan_memory
    from .report import FreezeReport

__all__ = [
    "AdapterFreezer",
    "AssetError",
    "Binding",
    "BindingError",
    "ConfigError",
    "FreezeReport",
    "MemoryPlan",
    "PlanError",
    "SafeCallback",
    "SafeConfig",
    "SafeError",
    "ScoreError",
    "StateError",
    "bind",
    "chunked_loss",
    "explain",
    "last_checkpoint",
    "plan_memory",
]

# Imported when first asked for: torch, PEFT and transformers take seconds, and `safe-peft report` needs none of them.
_LAZY = {
    "AdapterFreezer": "freezer",
    "Binding": "binding",
    "FreezeReport": "report",
    "MemoryPlan": "planning.memory",
    "SafeCallback": "callback",
    "SafeConfig": "config",
    "bind": "binding",
    "chunked_loss": "loss",
    "last_checkpoint": "checkpoints",
    "plan_memory": "planning.memory",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
