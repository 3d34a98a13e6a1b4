"""Says layer by layer which path serves an adapter, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

FAST = "safe_kernels::lora"
FUSED = "safe_kernels::lora_linear"
PEFT = "peft"
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class LayerPath:
    """Which path serves one adapter layer.

    Args:
        name: the layer's path in the model.
        kind: PEFT's type of it, such as "lora.Linear".
        path: "safe_kernels::lora" or "peft"; "safe_kernels::lora_linear" if its last call was computed in one with the
            base layer.
        reason: why; on the fast path mostly empty, or what there is to know about the base layer.
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
class PartPath:
    """Which path serves one part of a transformer block beside its adapters.

    Args:
        name: its path in the model.
        kind: its class.
        path: the op, or "as it is".
        reason: why it stays as it is, or what there is to know about how the op serves it.
    """

    name: str
    kind: str
    path: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: iterable over the adapter layers, and a table of everything when printed.

    Args:
        layers: the adapter layers.
        parts: norms, MLPs, activations and dropouts.
        blocks: by transformer block, what a training forward builds of a graph in it.
    """

    layers: tuple[LayerPath, ...]
    parts: tuple[PartPath, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LayerPath]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPath:
        return {layer.name: layer for layer in self.layers}[name]

    def __str__(self) -> str:
        if not self.layers:
            return "no adapter layers: the model has none of PEFT's"
        layers = [(row.name, row.kind, row.path, _state(row), row.reason) for row in self.layers]
        sections = [_table(("layer", "kind", "path", "state", "reason"), layers) + "\n" + self._count()]
        if self.parts:
            parts = [(row.name, row.kind, row.path, row.reason) for row in self.parts]
            sections.append(_table(("part", "kind", "path", "reason"), parts))
        if self.blocks:
            sections.append(_table(("block", "graph"), list(self.blocks.items())))
        return "\n\n".join(sections)

    def _count(self) -> str:
        paths = Counter(row.path for row in self.layers)
        summary = ", ".join(f"{count} by {path}" for path, count in paths.items())
        return f"{len(self.layers)} adapter layers: {summary}"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module) -> Explanation:
    """Say for every adapter layer, norm, MLP and dropout of a model which path its next call takes, and why.

    It also says for every transformer block whether a graph is built in it. What only a call can tell (its input's
    dtype, `adapter_names`) is not looked at.

    Args:
        model: a PEFT model, bound or not.

    Returns:
        One `LayerPath` an adapter layer, in the model's order, beside them `parts` and `blocks`; print it for tables.

    Example:
        >>> print(safe_peft.explain(model))  # doctest: +SKIP
        layer                       kind         path                state      reason
        encoder.layer.0.attn.query  lora.Linear  safe_kernels::lora  trainable
        1 adapter layers: 1 by safe_kernels::lora
    """
    from .adapters import peft_kind
    from .blocks.stack import graph_states
    from .paths import short_name, unwrap

    inner = unwrap(model)
    found = [(short_name(name), module, peft_kind(module)) for name, module in inner.named_modules()]
    rows = [_explain_layer(name, module, kind) for name, module, kind in found if kind is not None]
    prompts = getattr(inner, "prompt_encoder", None)
    if prompts is not None and len(prompts):
        rows.append(LayerPath("prompt_encoder", "prompt learning", PEFT, "prompt learning is not covered", True, False))
    return Explanation(tuple(rows), tuple(_explain_parts(inner)), graph_states(inner))


def _explain_parts(model: nn.Module) -> Iterator[PartPath]:
    from .blocks import parts_of, unrecognised
    from .swap import is_bound, original_type

    for name, module, part in parts_of(model):
        kind, refusal = original_type(module).__name__, part.refusal(module)
        if refusal is not None:
            yield PartPath(name, kind, AS_IT_IS, refusal)
        elif not is_bound(module):
            yield PartPath(name, kind, AS_IT_IS, f"not bound: after bind(model) {part.op} would serve it")
        else:
            yield PartPath(name, kind, part.op, part.note(module))
    for name, module, reason in unrecognised(model):
        yield PartPath(name, original_type(module).__name__, AS_IT_IS, reason)


def _explain_layer(name: str, layer: nn.Module, kind: str) -> LayerPath:
    from .adapters.base import adapter_keys, adapter_of, adapter_parameters
    from .swap import STATE

    known = adapter_of(layer)
    state = layer.__dict__.get(STATE)
    if known is None:
        path, reason = PEFT, f"{kind} is not covered"
    elif (refusal := known.refusal(layer)) is not None:
        path, reason = PEFT, refusal
    elif state is None:
        path, reason = PEFT, f"not bound: after bind(model) {FAST} would serve it"
    else:
        path, reason = FUSED if state.fused else FAST, known.note(layer)
    trainable = any(p.requires_grad for key in adapter_keys(layer) for p in adapter_parameters(layer, key))
    return LayerPath(name, kind, path, reason, trainable, state is not None and bool(state.frozen))


def _state(row: LayerPath) -> str:
    if row.frozen:
        return "frozen"
    return "trainable" if row.trainable else "fixed"
