"""Finds where bottleneck adapters go in a transformer block: the last linear layers of its attention and of its MLP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer import is_linear, widths

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)


class Sublayer(NamedTuple):
    """One sublayer of a block: the paths of its first and last linear layers."""

    is_attention: bool
    first: str
    last: str


def sublayers(model: nn.Module) -> list[Sublayer]:
    """Return the sublayers of all transformer blocks, which are the elements of the outermost `nn.ModuleList`s.

    Attention is recognised by the name or class of a module. The other linear layers of a block are its MLP: two, or
    three with a gate, from the hidden size to the hidden size.

    Raises:
        ValueError: A block has another structure, or there is none.
    """
    found = [sublayer for name, block in _blocks(model) for sublayer in _of_block(name, block)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no transformer block that is recognised: pass target_modules, the last linear "
            "layers of attention and MLP."
        )
    return found


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{other}.") for other in lists):
            continue
        if any(is_linear(child) for block in module for child in block.modules()):
            lists.append(name)
            yield from ((f"{name}.{key}", block) for key, block in module.named_children())


def _of_block(name: str, block: nn.Module) -> Iterator[Sublayer]:
    sizes = {path: widths(block.get_submodule(path)) for path in _linear(block)}
    groups: dict[str, list[str]] = {}
    for path in sizes:
        groups.setdefault(_attention_of(block, path), []).append(path)
    mlp = groups.pop("", [])
    hidden = sizes[mlp[0]][0] if mlp else 0
    # Phi-3 registers the last layer of its attention first.
    lasts = [[path for path in paths if sizes[path][1] == hidden] for paths in groups.values()]
    if not groups or not all(lasts) or len(mlp) not in (2, 3) or sizes[mlp[-1]][1] != hidden:
        raise ValueError(
            f"{name} ({type(block).__name__}) is not attention and an MLP of two or three linear layers; its linear "
            f"layers are {', '.join(sizes)}. Pass target_modules, the last linear layers of attention and MLP."
        )
    for paths, last in zip(groups.values(), lasts, strict=True):
        yield Sublayer(True, f"{name}.{paths[0]}", f"{name}.{last[-1]}")
    yield Sublayer(False, f"{name}.{mlp[0]}", f"{name}.{mlp[-1]}")


def _linear(block: nn.Module) -> Iterator[str]:
    """Yield the paths of a block's linear layers; an adapter layer counts as one."""
    inside = "\n"
    for path, module in block.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{path}."
        if is_linear(module):
            yield path


def _attention_of(block: nn.Module, path: str) -> str:
    """Return the path of the outermost attention module around a layer; "" if there is none."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        outer = ".".join(parts[:count])
        if _ATTENTION.search(parts[count - 1]) or _ATTENTION.search(type(block.get_submodule(outer)).__name__):
            return outer
    return ""
