"""Names the part of a model that retains a tensor, by the module that was running when autograd saved the tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..binding.adapters import peft_kind
from ..binding.adapters.base import adapter_keys

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


class Places:
    """The place of every module of a model: its path, block and part.

    Args:
        modules: the model's modules with their paths.
        blocks: paths of its transformer blocks, lowest first.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], blocks: Sequence[str]) -> None:
        self.paths = {id(module): path for path, module in modules}
        self._kinds = dict(modules)
        self._blocks = {name: index for index, name in enumerate(blocks)}
        self._layers = {path for path, module in modules if peft_kind(module) is not None}
        self._keys = {path: adapter_keys(self._kinds[path]) for path in self._layers}

    def block(self, path: str) -> int:
        """Return the index of the block that contains a path, or -1."""
        return next((index for prefix in _prefixes(path) if (index := self._blocks.get(prefix, -1)) >= 0), -1)

    def layer(self, path: str) -> str | None:
        """Return the path of the adapter layer that contains a path, if any."""
        return next((prefix for prefix in _prefixes(path) if prefix in self._layers), None)

    def part(self, path: str, *, before_blocks: bool) -> str:
        """Return one of `retained.PARTS`.

        Args:
            path: the path of the module that was running.
            before_blocks: whether no block has run yet.
        """
        module = self._kinds[path]
        if self.layer(path) is not None:
            return "LoRA dropout" if isinstance(module, nn.Dropout) else "LoRA inputs"
        if "norm" in type(module).__name__.lower():
            return "norms"
        if isinstance(module, nn.Dropout):
            return "dropout"
        block = self.block(path)
        if block < 0:
            return "embeddings" if before_blocks else "head and loss"
        if path in self._blocks:
            return "block"
        inside = path.removeprefix(next(name for name, index in self._blocks.items() if index == block))
        return "attention" if _ATTENTION.search(f"{inside} {type(module).__name__}") else "MLP"


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
