"""How modules are at one moment, so that a later call finds them as they were: modes, hooks, replaced forwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..adapters import LayerState
from ..swap import STATE
from .arguments import version

_ENGINES = frozenset({"_parameters", "_buffers"})
"""FSDP puts other parameters there before each call, and knows itself when."""


class Moment:
    """Remembers a block's modules when it is made.

    Between forward and backward a user may call `eval()`, leave `disable_adapter()`, take off hooks or change a
    dropout. A block that runs again must not notice. Attributes that are lists, dicts or sets are remembered by what
    is in them, others as they are; so a second call leaves no trace in them either.

    Args:
        modules: the block and all modules in it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._then = [_attributes(module) for module in modules]
        self._buffers = self._buffer_versions()
        self._parameters = {
            id(p): version(p) for module in modules for p in module._parameters.values() if p is not None
        }

    def _buffer_versions(self) -> list[tuple[int, int]]:
        return [(id(b), version(b)) for module in self._modules for b in module._buffers.values() if b is not None]

    def buffers_changed(self) -> bool:
        """Whether a buffer was replaced or written in place since."""
        return self._buffer_versions() != self._buffers

    def check_parameters(self, name: str) -> None:
        """See that no parameter was written in place since.

        Args:
            name: what the message calls the block.

        Raises:
            RuntimeError: One was, as autograd would have it of one that it saved.
        """
        for module in self._modules:
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                now = version(parameter)
                if self._parameters.get(id(parameter), now) != now:
                    raise RuntimeError(
                        f"{key} of a {type(module).__name__} in {name} was modified by an inplace operation between "
                        "forward and backward, and the block runs again in backward; step the optimizer after "
                        "backward, or take the block out of `binding.recompute`."
                    )

    @contextmanager
    def back(self) -> Iterator[None]:
        """Inside the block modules are as they were, and no adapter is scored; afterwards they are as they are now."""
        states = [s for module in self._modules if isinstance(s := module.__dict__.get(STATE), LayerState)]
        observed = [state.observe for state in states]
        now = [_attributes(module) for module in self._modules]
        try:
            for state in states:
                state.observe = {}
            self._put(self._then)
            yield
        finally:
            self._put(now)
            for state, observe in zip(states, observed, strict=True):
                state.observe = observe

    def _put(self, attributes: Sequence[dict[str, Any]]) -> None:
        for module, known in zip(self._modules, attributes, strict=True):
            own, kind = module.__dict__, known[_CLASS]
            for name in [name for name in own if name not in known and name not in _ENGINES]:
                del own[name]
            for name, value in known.items():
                if name != _CLASS:
                    own[name] = _copy(value)
            if type(module) is not kind:  # bound then, and not now
                module.__class__ = kind


_CLASS = "__class__"
_CONTAINERS = frozenset({list, dict, set, OrderedDict})


def _copy(value: Any) -> Any:
    if type(value) not in _CONTAINERS:
        return value
    return value.copy() if value else type(value)()


def _attributes(module: nn.Module) -> dict[str, Any]:
    found = {name: _copy(value) for name, value in module.__dict__.items() if name not in _ENGINES}
    found[_CLASS] = type(module)
    return found
