"""Says layer by layer which path serves an adapter, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

FAST = "safe_kernels::lora"
PEFT = "peft"


@dataclass(frozen=True)
class LayerPath:
    """Which path serves one adapter layer.

    Args:
        name: the layer's path in the model.
        kind: PEFT's type of it, such as "lora.Linear".
        path: "safe_kernels::lora" or "peft".
        reason: why; empty when nothing speaks against the fast path.
        trainable: whether any of its adapters' parameters requires grad.
        frozen: whether a freezer has frozen an adapter of it.
    """

    name: str
    kind: str
    path: str
    reason: str
    trainable: bool
    frozen: bool


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: iterable, and a table when printed."""

    layers: tuple[LayerPath, ...]

    def __iter__(self) -> Iterator[LayerPath]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPath:
        return {layer.name: layer for layer in self.layers}[name]

    def __str__(self) -> str:
        if not self.layers:
            return "no adapter layers: the model has none of PEFT's"
        heads = ("layer", "kind", "path", "state", "reason")
        rows = [heads] + [(row.name, row.kind, row.path, _state(row), row.reason) for row in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        paths = Counter(row.path for row in self.layers)
        summary = ", ".join(f"{count} by {path}" for path, count in paths.items())
        return "\n".join([*lines, f"{len(self.layers)} adapter layers: {summary}"])


def explain(model: nn.Module) -> Explanation:
    """Say for every adapter layer of a model which path its next call takes, and why.

    What only a call can tell (its input's dtype, `adapter_names`) is not looked at.

    Args:
        model: a PEFT model, bound or not.

    Returns:
        One `LayerPath` a layer, in the model's order; print it for a table.

    Example:
        >>> print(safe_peft.explain(model))  # doctest: +SKIP
        layer                       kind         path                state      reason
        encoder.layer.0.attn.query  lora.Linear  safe_kernels::lora  trainable
        1 adapter layers: 1 by safe_kernels::lora
    """
    from .adapters import peft_kind
    from .binding import short_name, unwrap

    inner = unwrap(model)
    found = [(short_name(name), module, peft_kind(module)) for name, module in inner.named_modules()]
    rows = [_explain_layer(name, module, kind) for name, module, kind in found if kind is not None]
    prompts = getattr(inner, "prompt_encoder", None)
    if prompts is not None and len(prompts):
        rows.append(LayerPath("prompt_encoder", "prompt learning", PEFT, "prompt learning is not covered", True, False))
    return Explanation(tuple(rows))


def _explain_layer(name: str, layer: nn.Module, kind: str) -> LayerPath:
    from .adapters.base import STATE, adapter_keys, adapter_of, adapter_parameters

    known = adapter_of(layer)
    state = layer.__dict__.get(STATE)
    if known is None:
        path, reason = PEFT, f"{kind} is not covered"
    elif (refusal := known.refusal(layer)) is not None:
        path, reason = PEFT, refusal
    elif state is None:
        path, reason = PEFT, f"not bound: after bind(model) {FAST} would serve it"
    else:
        path, reason = FAST, ""
    trainable = any(p.requires_grad for key in adapter_keys(layer) for p in adapter_parameters(layer, key))
    return LayerPath(name, kind, path, reason, trainable, state is not None and bool(state.frozen))


def _state(row: LayerPath) -> str:
    if row.frozen:
        return "frozen"
    return "trainable" if row.trainable else "fixed"
