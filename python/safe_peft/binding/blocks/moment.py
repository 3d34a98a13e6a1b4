"""A snapshot of modules, for a later call in the same state: training mode, hooks, replaced forwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from safe_kernels.inversion import fingerprint

from ..adapters import LayerState
from ..class_swap import STATE
from .arguments import version

_ENGINES = frozenset({"_parameters", "_buffers"})
"""FSDP replaces these before each call, so they are not part of a snapshot."""
_HOOKS_ON_ALL: tuple[dict[int, Any], ...] = tuple(
    hooks
    for name, hooks in vars(global_hooks).items()
    if name.startswith("_global_") and name.endswith(("_hooks", "_called"))
)


class Moment:
    """A snapshot of a block's modules.

    Between forward and backward a user may call `eval()`, leave `disable_adapter()`, remove hooks or change a dropout.
    A recomputed block must run in its earlier state. The snapshot copies the contents of lists, dicts and sets, and
    stores other attributes by reference. So a second call does not change any of them.

    Args:
        modules: the block and all modules in it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._then = [_look(module) for module in modules]
        self._on_all = [hooks.copy() for hooks in _HOOKS_ON_ALL]
        self._names = [tuple(module._parameters) for module in modules]
        self._buffers = self._buffer_versions()
        # An id is used again if its object is gone, so the objects are kept.
        self._tensors = [t for m in modules for kind in (m._parameters, m._buffers) for t in kind.values()]
        self._parameters = {
            id(p): _values(p) for module in modules for p in module._parameters.values() if p is not None
        }

    def _buffer_versions(self) -> list[tuple[int, int]]:
        return [(id(b), version(b)) for module in self._modules for b in module._buffers.values() if b is not None]

    def buffers_changed(self) -> bool:
        """Whether a buffer was replaced or written in place since then."""
        return self._buffer_versions() != self._buffers

    def holds(self) -> bool:
        """Whether modules, parameters and buffers are as they were then."""
        if self.buffers_changed() or not all(map(_is_as, self._modules, self._then)):
            return False
        now = {id(p): _values(p) for module in self._modules for p in module._parameters.values() if p is not None}
        return now == self._parameters

    def check_parameters(self, name: str) -> None:
        """Check that no parameter was written in place since then, or removed, as parametrizing and pruning do.

        Writes through .data are detected only for parameters of one dimension on a CPU: norms, biases.

        Args:
            name: the block's name in the message.

        Raises:
            RuntimeError: A parameter was written to or removed. Autograd raises the same for a tensor that it saved.
        """
        for module, names in zip(self._modules, self._names, strict=True):
            if gone := [key for key in names if key not in module._parameters]:
                raise RuntimeError(
                    f"{gone[0]} of a {type(module).__name__} in {name} was replaced between forward and backward, and "
                    "backward recomputes the block; change the model after backward, or remove the block from "
                    "`binding.recompute`."
                )
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                now = _values(parameter)
                if self._parameters.get(id(parameter), now) != now:
                    raise RuntimeError(
                        f"{key} of a {type(module).__name__} in {name} was modified by an inplace operation between "
                        "forward and backward, and backward recomputes the block; step the optimizer after "
                        "backward, or remove the block from `binding.recompute`."
                    )

    @contextmanager
    def back(self) -> Iterator[None]:
        """Restore the snapshot inside the `with` block, without scoring; restore the current state after it."""
        states = [s for module in self._modules if isinstance(s := module.__dict__.get(STATE), LayerState)]
        observed = [state.observe for state in states]
        changed = [not _is_as(module, then) for module, then in zip(self._modules, self._then, strict=True)]
        now = [
            _look(module) if is_other else then
            for module, then, is_other in zip(self._modules, self._then, changed, strict=True)
        ]
        on_all = [hooks.copy() for hooks in _HOOKS_ON_ALL]
        try:
            for state in states:
                state.observe = {}
            self._put(self._then)
            _put_on_all(self._on_all)
            yield
        finally:
            _put_on_all(on_all)
            self._put(now)
            for state, observe in zip(states, observed, strict=True):
                state.observe = observe

    def _put(self, looks: Sequence[_Look]) -> None:
        for module, look in zip(self._modules, looks, strict=True):
            if not _is_as(module, look):
                _restore(module, look)


def _values(parameter: Tensor) -> tuple[int, int | None]:
    """Return the values that a write changes."""
    return version(parameter), fingerprint(parameter) if parameter.dim() == 1 else None


def _put_on_all(wanted: Sequence[dict[int, Any]]) -> None:
    for hooks, those in zip(_HOOKS_ON_ALL, wanted, strict=True):
        if hooks != those:
            hooks.clear()
            hooks.update(those)


class _Look(NamedTuple):
    """A module's class, its attributes, and the contents of attributes that are containers and not empty."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    contents: dict[str, Any]


_CONTAINERS = frozenset({list, dict, set, OrderedDict})


def _look(module: nn.Module) -> _Look:
    return _Look(type(module), module.__dict__.copy(), _contents(module, copied=True))


def _contents(module: nn.Module, *, copied: bool) -> dict[str, Any]:
    items = module.__dict__.items()
    full = {name: v for name, v in items if type(v) in _CONTAINERS and v and name not in _ENGINES}
    return {name: value.copy() for name, value in full.items()} if copied else full


def _is_as(module: nn.Module, look: _Look) -> bool:
    """Whether nothing has changed, compared by identity, because comparing two tensors is not possible here."""
    own = module.__dict__
    if type(module) is not look.kind or len(own) != len(look.attributes):
        return False
    if not all(map(is_, own.values(), look.attributes.values())):
        return False
    full = _contents(module, copied=False)
    return full.keys() == look.contents.keys() and all(_same(full[name], look.contents[name]) for name in full)


def _same(one: Any, other: Any) -> bool:
    if len(one) != len(other) or not all(map(is_, one, other)):
        return False
    return not isinstance(one, dict) or all(map(is_, one.values(), other.values()))


def _restore(module: nn.Module, look: _Look) -> None:
    own = module.__dict__
    engines = {name: own[name] for name in _ENGINES}
    own.clear()
    for name, value in look.attributes.items():
        if type(value) in _CONTAINERS:
            own[name] = look.contents[name].copy() if name in look.contents else type(value)()
        else:
            own[name] = value
    own.update(engines)
    if type(module) is not look.kind:  # bound then, and not now
        module.__class__ = look.kind
