"""Says layer by layer which path serves an adapter, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

FAST = "safe_kernels::lora"
FUSED = "safe_kernels::lora_linear"
PEFT = "peft"
AS_IT_IS = "as it is"
_NO_LAYERS = "no adapter layers: the model has none of PEFT's"


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
    """Which path serves one part of a transformer block other than its adapters.

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
    """What `explain` found: iterable over the adapter layers; printed, a summary; `details()` lists everything.

    Args:
        layers: the adapter layers.
        parts: norms, MLPs, activations and dropouts.
        blocks: by transformer block, what a training forward builds of a graph in it.
        notes: settings of the model that cost memory in training.
    """

    layers: tuple[LayerPath, ...]
    parts: tuple[PartPath, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[LayerPath]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPath:
        return {layer.name: layer for layer in self.layers}[name]

    def __str__(self) -> str:
        if not self.layers:
            return _NO_LAYERS
        lines = [_by_path("adapter layers", self.layers)]
        lines += _counted(f"{row.path}: {row.reason}" for row in self.layers if row.reason)
        lines += _counted(map(_state, self.layers))
        if self.parts:
            lines.append(_by_path("parts", self.parts))
            lines += _counted(f"{row.path}: {row.reason}" for row in self.parts if row.reason)
        if self.blocks:
            lines += [f"{len(self.blocks)} blocks", *_counted(self.blocks.values())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "details() lists every layer, part and block"])

    def details(self) -> str:
        """Return tables of every layer, part and block.

        Example:
            >>> print(safe_peft.explain(model).details())  # doctest: +SKIP
            layer                       kind         path                state      reason
            encoder.layer.0.attn.query  lora.Linear  safe_kernels::lora  trainable
        """
        if not self.layers:
            return _NO_LAYERS
        layers = [(row.name, row.kind, row.path, _state(row), row.reason) for row in self.layers]
        sections = [_table(("layer", "kind", "path", "state", "reason"), layers)]
        if self.parts:
            parts = [(row.name, row.kind, row.path, row.reason) for row in self.parts]
            sections.append(_table(("part", "kind", "path", "reason"), parts))
        if self.blocks:
            sections.append(_table(("block", "graph"), list(self.blocks.items())))
        return "\n\n".join([*sections, *(f"note: {note}" for note in self.notes)])


def _by_path(what: str, rows: Sequence[LayerPath] | Sequence[PartPath]) -> str:
    """Such as "8 adapter layers: 6 by safe_kernels::lora, 2 by peft"."""
    counts = Counter(row.path if row.path == AS_IT_IS else f"by {row.path}" for row in rows)
    return f"{len(rows)} {what}: " + ", ".join(f"{count} {path}" for path, count in counts.most_common())


def _counted(texts: Iterable[str]) -> list[str]:
    """One line per text, the most frequent first."""
    return [f"  {count:>4}  {text}" for text, count in Counter(texts).most_common()]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module) -> Explanation:
    """Say for every adapter layer, norm, MLP and dropout of a model which path its next call takes, and why.

    It also says for every transformer block whether a graph is built in it, and which settings cost memory. What only a
    call can tell (its input's dtype, `adapter_names`) is not looked at.

    Args:
        model: a PEFT model, bound or not.

    Returns:
        One `LayerPath` per adapter layer, in the model's order, with `parts`, `blocks` and `notes`. Print it for a
        summary, and its `details()` for tables.

    Example:
        >>> print(safe_peft.explain(model))  # doctest: +SKIP
        12 adapter layers: 10 by safe_kernels::lora, 2 by peft
             2  peft: LoRA variant DoRA
            12  trainable
        5 parts: 5 by safe_kernels::layer_norm
        2 blocks
             2  trains
        details() lists every layer, part and block
    """
    from ..distributed.wrappers import short_name, unwrap
    from .adapters import peft_kind
    from .blocks.stack import graph_states

    inner = unwrap(model)
    found = [(short_name(name), module, peft_kind(module)) for name, module in inner.named_modules()]
    rows = [_explain_layer(name, module, kind) for name, module, kind in found if kind is not None]
    prompts = getattr(inner, "prompt_encoder", None)
    if prompts is not None and len(prompts):
        rows.append(LayerPath("prompt_encoder", "prompt learning", PEFT, "prompt learning is not covered", True, False))
    return Explanation(tuple(rows), tuple(_explain_parts(inner)), graph_states(inner), tuple(_notes(inner)))


def _explain_parts(model: nn.Module) -> Iterator[PartPath]:
    from .blocks import parts_of, unrecognised
    from .class_swap import is_bound, original_type

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


def _notes(model: nn.Module) -> Iterator[str]:
    """A cache of keys and values, which only generation needs, kept by every forward that trains."""
    from .blocks import transformer_blocks

    blocks, seen = transformer_blocks(model).values(), set()
    idle = {id(block) for block in blocks if not getattr(block, "gradient_checkpointing", False)}
    for module in model.modules():
        config = module.__dict__.get("config")
        holds = any(id(block) in idle for child in module.children() for block in child.children())
        if id(config) in seen or not (holds and module.training and getattr(config, "use_cache", False)):
            continue
        if not any(part.__dict__.get("is_causal") or part.__dict__.get("is_decoder") for part in module.modules()):
            continue  # an encoder's config has the switch as well
        seen.add(id(config))
        yield (
            "use_cache is on while the model trains: each layer keeps keys and values, up to 2d numbers per token; "
            f"{_path_of(config, model)}.use_cache = False"
        )


def _path_of(config: object, model: nn.Module) -> str:
    """How a user reaches a config: a multimodal model's blocks read the one inside it."""
    outer = getattr(model, "config", None)
    inner = next((name for name, value in getattr(outer, "__dict__", {}).items() if value is config), None)
    return "model.config" if inner is None else f"model.config.{inner}"


def _explain_layer(name: str, layer: nn.Module, kind: str) -> LayerPath:
    from .adapters.base import adapter_keys, adapter_of, adapter_parameters
    from .class_swap import STATE

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
