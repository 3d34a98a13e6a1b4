"""Shows for each layer which path computes its adapter, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PEFT = "peft"
AS_IT_IS = "unchanged"
_NO_LAYERS = "no adapter layers: the model has no adapter layer of PEFT"


@dataclass(frozen=True)
class PartPath:
    """The path of one part of a transformer block: a norm, an MLP, an activation or a dropout.

    Args:
        name: the part's path in the model.
        kind: the part's class.
        path: the op, or "unchanged".
        reason: the reason why the part is unchanged, or a remark about the op.
    """

    name: str
    kind: str
    path: str
    reason: str


@dataclass(frozen=True)
class LayerPath(PartPath):
    """The path of one adapter layer; its `kind` is PEFT's type, such as "lora.Linear".

    `path` is "safe_kernels::lora", "safe_kernels::dora" or the like, or "peft" ("adapters" for AdapterHub's adapters).
    It is "safe_kernels::lora_linear" if one op computed the last call together with the base layer. On the fast path
    `reason` is usually empty, or a remark about the base.

    Args:
        trainable: whether a parameter of its adapters requires grad.
        frozen: whether a freezer has frozen one of its adapters.
    """

    trainable: bool
    frozen: bool

    @property
    def state(self) -> str:
        """The two in one word."""
        return "frozen" if self.frozen else "trainable" if self.trainable else "fixed"


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`. Print it for a summary, iterate over it for the adapter layers.

    Args:
        layers: the adapter layers.
        parts: norms, MLPs, activations and dropouts.
        blocks: by transformer block, the graph that a training forward builds in it, in words.
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
        lines = [*_by_path("adapter layers", self.layers), *_counted(row.state for row in self.layers)]
        if self.parts:
            lines += _by_path("parts", self.parts)
        if self.blocks:
            lines += [f"{len(self.blocks)} blocks", *_counted(self.blocks.values())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "details() lists every layer, part and block"])

    def details(self) -> str:
        """Return tables of every layer, part and block.

        Example:
            >>> from peft import LoraConfig, get_peft_model
            >>> from torch import nn
            >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
            >>> print(explain(model).details())
            layer  kind         path  state      reason
            0      lora.Linear  peft  trainable  not bound: bind(model) puts it on safe_kernels::lora
        """
        if not self.layers:
            return _NO_LAYERS
        layers = [(row.name, row.kind, row.path, row.state, row.reason) for row in self.layers]
        sections = [_table(("layer", "kind", "path", "state", "reason"), layers)]
        if self.parts:
            parts = [(row.name, row.kind, row.path, row.reason) for row in self.parts]
            sections.append(_table(("part", "kind", "path", "reason"), parts))
        if self.blocks:
            sections.append(_table(("block", "graph"), list(self.blocks.items())))
        return "\n\n".join([*sections, *(f"note: {note}" for note in self.notes)])


def _by_path(what: str, rows: Sequence[PartPath]) -> list[str]:
    """Return a line such as "8 adapter layers: 6 by safe_kernels::lora, 2 by peft", and lines with the reasons."""
    counts = Counter(row.path if row.path == AS_IT_IS else f"by {row.path}" for row in rows)
    line = f"{len(rows)} {what}: " + ", ".join(f"{count} {path}" for path, count in counts.most_common())
    return [line, *_counted(f"{row.path}: {row.reason}" for row in rows if row.reason)]


def _counted(texts: Iterable[str]) -> list[str]:
    """Return one line per text, the most frequent first."""
    return [f"  {count:>4}  {text}" for text, count in Counter(texts).most_common()]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module) -> Explanation:
    """Show for every adapter layer, norm, MLP and dropout of a model which path its next call takes, and why.

    The result also shows for every transformer block whether a graph is built in it, and which settings cost memory.
    Conditions that depend on a call (its input's dtype, `adapter_names`) are not included.

    Args:
        model: a PEFT model, bound or not.

    Returns:
        One `LayerPath` per adapter layer, in the model's order, with `parts`, `blocks` and `notes`. Print it for a
        summary, and its `details()` for tables.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from safe_peft import bind
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0", "2"]))
        >>> with bind(model):
        ...     print(explain(model))
        2 adapter layers: 2 by safe_kernels::lora
             2  trainable
        1 parts: 1 by safe_kernels::layer_norm
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
        path, reason = AS_IT_IS, part.refusal(module)
        if reason is None and is_bound(module):
            path, reason = part.op, part.note(module)
        elif reason is None:
            reason = f"not bound: bind(model) puts it on {part.op}"
        yield PartPath(name, original_type(module).__name__, path, reason)
    for name, module, reason in unrecognised(model):
        yield PartPath(name, original_type(module).__name__, AS_IT_IS, reason)


def _notes(model: nn.Module) -> Iterator[str]:
    """Yield a note per reason why calls on a GPU run in Python, and one if training keeps keys and values.

    Only generation needs the cache of keys and values.
    """
    from safe_kernels.triton.runtime.launch_replay import OBSTACLES

    from .blocks import transformer_blocks

    for obstacle, count in OBSTACLES.items():
        yield f"{count} kinds of calls on a GPU run in Python, with ten times the processor time: {obstacle}"

    blocks, seen = transformer_blocks(model).values(), set()
    idle = {id(block) for block in blocks if not getattr(block, "gradient_checkpointing", False)}
    for module in model.modules():
        config = module.__dict__.get("config")
        holds = any(id(block) in idle for child in module.children() for block in child.children())
        if id(config) in seen or not (holds and module.training and getattr(config, "use_cache", False)):
            continue
        if not any(part.__dict__.get("is_causal") or part.__dict__.get("is_decoder") for part in module.modules()):
            continue  # an encoder's config has this option too, without effect
        seen.add(id(config))
        outer = getattr(getattr(model, "config", None), "__dict__", {})  # a multimodal model has configs in its config
        path = next((f"model.config.{name}" for name, value in outer.items() if value is config), "model.config")
        yield (
            "use_cache is on while the model trains: each layer keeps keys and values, up to 2d numbers per token; "
            f"set {path}.use_cache = False"
        )


def _explain_layer(name: str, layer: nn.Module, kind: str) -> LayerPath:
    from .adapters.base import adapter_keys, adapter_of, adapter_parameters
    from .class_swap import STATE

    known = adapter_of(layer)
    state = layer.__dict__.get(STATE)
    if known is None:
        path, reason = PEFT, f"{kind} is not covered"
    elif (refusal := known.refusal(layer)) is not None:
        path, reason = known.library, refusal
    elif state is None:
        path, reason = known.library, f"not bound: bind(model) puts it on safe_kernels::{known.op(layer)}"
    else:
        path, reason = f"safe_kernels::{known.op(layer)}", known.note(layer)
    trainable = any(p.requires_grad for key in adapter_keys(layer) for p in adapter_parameters(layer, key))
    return LayerPath(name, kind, path, reason, trainable, state is not None and bool(state.frozen))
