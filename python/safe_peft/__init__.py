"""SAFE, Selective Adapter FrEezing (arXiv 2412.03587), for PEFT models, on kernels that retain only what they need."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .binding.explain import explain
from .errors import (
    BindingError,
    ConfigError,
    MissingPackageError,
    PlanError,
    SafeError,
    ScoreError,
    StateError,
)

if TYPE_CHECKING:
    from .binding.bind import Binding, bind
    from .callback import SafeCallback
    from .files.checkpoints import last_checkpoint
    from .freezing.config import SafeConfig
    from .freezing.freezer import AdapterFreezer
    from .loss import chunked_loss
    from .planning.memory import MemoryPlan, plan_memory
    from .report.report import FreezeReport

__all__ = [
    "AdapterFreezer",
    "Binding",
    "BindingError",
    "ConfigError",
    "FreezeReport",
    "MemoryPlan",
    "MissingPackageError",
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
    "AdapterFreezer": "freezing.freezer",
    "Binding": "binding.bind",
    "FreezeReport": "report.report",
    "MemoryPlan": "planning.memory",
    "SafeCallback": "callback",
    "SafeConfig": "freezing.config",
    "bind": "binding.bind",
    "chunked_loss": "loss",
    "last_checkpoint": "files.checkpoints",
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
