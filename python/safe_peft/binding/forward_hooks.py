"""Observes a model's forwards with hooks that are not part of copies and pickles of the model."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..distributed.wrappers import walk
from .adapters import peft_kind
from .class_swap import is_bound


@dataclass(eq=False)
class Call:
    """A forward that is running."""

    module: nn.Module
    outer: Call | None
    """The observed forward around it, in the same thread."""
    task: int
    """The number of the backward pass around it, or -1."""
    error: int
    """Identity of the exception that was being handled when the forward began."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Data of the watcher's owner."""


Begin = Callable[[Call, tuple[Any, ...], Mapping[str, Any]], None]
End = Callable[[Call, Any, bool], None]


class Hook:
    """A hook that is not copied or pickled with its module."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._function(*args)

    def __reduce__(self) -> Any:
        """Put a standard function without effect into copies and pickles, so that loading needs no import of ours."""
        return getattr, (nullcontext(), "__exit__")


class Watcher:
    """Calls functions before and after the forwards of a model, and of the models inside it: see `watched`.

    Args:
        model: a PEFT model, a module that contains one or several, or a model with adapter layers.
        begin: called before each forward with its `Call`, its arguments and its keyword arguments.
        end: called after each forward with its `Call`, its output, and whether it raised an exception.
    """

    def __init__(self, model: nn.Module, begin: Begin, end: End | None = None) -> None:
        self._begin, self._end = begin, end
        self._suspensions = 0
        self._threads = threading.local()
        before, after = Hook(self._before), Hook(self._after)
        self._hooks: list[RemovableHandle] = []
        for module in watched(model):
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    @property
    def current(self) -> Call | None:
        """The innermost observed forward that is running in this thread."""
        return self._calls[-1] if self._calls else None

    def reset(self) -> None:
        """Remove the entries that interrupted forwards of this thread left. Call it when no forward is running."""
        self._calls.clear()

    @property
    def is_suspended(self) -> bool:
        """Whether forwards are to be ignored; the entries of running forwards are still kept."""
        return self._suspensions > 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Ignore forwards while the `with` block runs."""
        self._suspensions += 1
        try:
            yield
        finally:
            self._suspensions -= 1

    def close(self) -> None:
        """Remove the hooks from the model."""
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def _calls(self) -> list[Call]:
        return self._threads.__dict__.setdefault("calls", [])

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        calls = self._calls
        # An interrupt ends a forward without running any hook. Its entry is removed when its module is called again.
        stale = next((index for index, call in enumerate(calls) if call.module is module), len(calls))
        del calls[stale:]
        call = Call(module, calls[-1] if calls else None, torch._C._current_graph_task_id(), id(sys.exc_info()[1]))
        calls.append(call)
        self._begin(call, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        calls = self._calls
        index = next((index for index, call in enumerate(calls) if call.module is module), None)
        if index is None:
            return
        call = calls[index]
        del calls[index:]
        if self._end is not None:
            # PyTorch does not pass the exception to an `always_call` hook, but runs the hook while handling it.
            self._end(call, output, id(sys.exc_info()[1]) != call.error)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(_names(module) if args else (), args, strict=False)) | dict(kwargs)


def _names(module: nn.Module) -> list[str]:
    """Return the names of a forward's arguments. PEFT's wrappers have only *args, and call the model in them."""
    parameters = inspect.signature(module.forward).parameters
    wrapped = module._modules.get("base_model", module._modules.get("model"))
    is_wrapper = next(iter(parameters), "") == "args" and wrapped is not None
    return _names(wrapped) if is_wrapper else list(parameters)  # type: ignore[arg-type]


def attention_masks(named: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the attention masks [samples, tokens] among a forward's arguments, also those inside a dict of features."""
    for held in [named, *(value for value in named.values() if isinstance(value, Mapping))]:
        for name, mask in held.items():
            named_so = isinstance(name, str) and name.endswith("attention_mask")
            if named_so and isinstance(mask, Tensor) and mask.dim() == 2:
                yield mask


def watched(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose calls are a model's forwards.

    These are the model itself, every PEFT model in it, every model of a library that has adapters, and the models
    directly inside those. An outer model may call the inner one by `forward`, without hooks, and a user may call the
    inner model directly.
    """
    modules = dict(walk(model))
    paths = {prefix for name in _adapted(modules) for prefix in accumulate(name.split("."), "{}.{}".format)}
    adapted = {id(model), *(id(modules[path]) for path in paths & modules.keys())}
    found, roots = [model], list(models_in(model))
    for root in roots:
        found += [root, *_inside(root, adapted)]
    if not roots:
        found += _only_children(model, adapted)
    return list(dict.fromkeys(found))


def models_in(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every PEFT model in a model, and the outermost models into which a library has put adapters."""
    modules = dict(walk(model))
    layers, outermost = _adapted(modules), list[str]()
    for name, module in modules.items():
        is_peft = callable(getattr(type(module), "get_base_model", None))
        is_outer = hasattr(type(module), "add_adapter") and not any(_is_in(name, other) for other in outermost)
        if (is_peft or is_outer) and any(_is_in(layer, name) for layer in layers):
            outermost.append(name)
            yield module


def _adapted(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if peft_kind(module) is not None]


def _inside(root: nn.Module, adapted: set[int]) -> Iterator[nn.Module]:
    """Yield PEFT's tuner, its model, and that model's own inner model: a causal model contains one without a head."""
    module: Any = root
    if callable(getattr(type(root), "get_base_model", None)):
        module = root.get_base_model()  # type: ignore[operator]
        yield from (inner for inner in (root._modules.get("base_model"), module) if isinstance(inner, nn.Module))
    inner = module._modules.get(getattr(module, "base_model_prefix", None))
    if inner is not None and id(inner) in adapted:
        yield inner


def _only_children(module: nn.Module, adapted: set[int]) -> Iterator[nn.Module]:
    """Yield the modules that contain all adapters of another model, from the outside in."""
    while not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        children = [child for child in module._modules.values() if id(child) in adapted]
        if len(children) != 1 or children[0] is None or peft_kind(children[0]) or is_bound(children[0]):
            return
        module = children[0]
        yield module


def _is_in(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(f"{other}.")
