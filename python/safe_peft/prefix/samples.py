"""The samples in a block's arguments: a key for each by its content, and the arguments of some of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from ..binding.blocks.arguments import leaves, may_carry

PACKED = ("cu_seq", "seq_idx")
"""Prefixes of the names of arguments that mark several samples in one row."""


class Samples:
    """The arguments of a block, seen as a batch of samples; `hidden` [samples, tokens, features] is one of them.

    `reason` says why the arguments of single samples cannot be separated; "" if they can.

    Example:
        >>> hidden = torch.randn(3, 5, 2)
        >>> samples = Samples((hidden, torch.ones(3, 1, 5, 5)), {}, hidden)
        >>> (one, mask), _ = samples.some(torch.tensor([0, 2]))
        >>> one.shape, mask.shape, len(set(samples.keys([None] * 3)))
        (torch.Size([2, 5, 2]), torch.Size([2, 1, 5, 5]), 3)
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> None:
        self._given, self._hidden = (args, kwargs), hidden
        self._count, self._tokens = (*hidden.shape, 0, 0)[:2]
        self.reason = self._refusal()

    def _refusal(self) -> str:
        if self._hidden.dim() != 3:
            return "its hidden states are not [samples, tokens, features]"
        if self._count == self._tokens:
            return "there are as many samples as tokens in this batch"
        if packed := [name for name in self._given[1] if name.startswith(PACKED)]:
            return f"{packed[0]} marks several samples in one row"
        for leaf in leaves(self._given):
            if isinstance(leaf, Tensor):
                if leaf.requires_grad:
                    return "a trained part gives the block an argument"
                if leaf.layout is not torch.strided or self._is_unclear(leaf):
                    return f"an argument of shape {tuple(leaf.shape)} does not show its samples"
            elif may_carry(leaf):
                return f"it gets a {type(leaf).__name__}, such as a KV cache; set use_cache=False"
        return ""

    def _is_unclear(self, leaf: Tensor) -> bool:
        if leaf.shape == (self._count, self._tokens, self._tokens):
            return True  # one matrix per sample, or one per head
        return not self._has_samples(leaf) and leaf.dim() > 1 and leaf.shape[0] not in (1, self._tokens)

    def _has_samples(self, leaf: Tensor) -> bool:
        return leaf.dim() > 0 and leaf.shape[0] == self._count

    def some(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the samples with these indices."""
        take = lambda leaf: leaf.index_select(0, rows) if self._has_samples(leaf) else leaf  # noqa: E731
        args, kwargs = tree_map_only(Tensor, take, self._given)
        return args, kwargs

    def keys(self, kept: Sequence[Tensor | None]) -> list[str]:
        """Return a key per sample: equal keys mean equal arguments, except for padding and the place in the batch.

        Per sample, `kept` has the indices of its tokens that are not padding; None means all tokens.
        """
        given = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(self._given)[0]]
        plain = repr([(name, leaf) for name, leaf in given if not isinstance(leaf, Tensor)])
        common = hashlib.blake2b(f"{plain} {_autocast(self._hidden.device.type)}".encode())
        hidden = self._hidden.detach().cpu()
        others = [(name, leaf) for name, leaf in given if isinstance(leaf, Tensor) and leaf is not self._hidden]
        tensors = [(name, leaf.detach().cpu(), self._has_samples(leaf)) for name, leaf in others]
        return [self._key(common, hidden[row], tensors, row, places) for row, places in enumerate(kept)]

    def _key(
        self, common: Any, hidden: Tensor, others: Sequence[tuple[str, Tensor, bool]], row: int, places: Tensor | None
    ) -> str:
        digest = common.copy()
        parts = [("", hidden if places is None else hidden[places])]
        for name, tensor, has_samples in others:
            parts.append((name, _without_padding(name, tensor[row] if has_samples else tensor, self._tokens, places)))
        if places is not None and bool((places.diff() != 1).any()):
            parts.append(("holes", places - places[0]))
        for name, part in parts:
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy())
        return str(digest.hexdigest()[:32])


def _without_padding(name: str, part: Tensor, tokens: int, places: Tensor | None) -> Tensor:
    """Select the tokens of a sample in a mask or in positions; the tokens of another argument may be others."""
    if places is None:
        return part
    if part.dim() >= 2 and part.shape[-2:] == (tokens, tokens):
        return part.index_select(-2, places).index_select(-1, places)
    if part.dim() >= 2 and part.shape[-2:] == (1, tokens):
        return part.index_select(-1, places)
    dims = [dim for dim, length in enumerate(part.shape) if length == tokens]
    named_so = "position" in name or "mask" in name
    return part.index_select(dims[0], places) if dims and named_so else part


def _autocast(device: str) -> str:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return ""
    return str(torch.get_autocast_dtype(device))
