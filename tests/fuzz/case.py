"""One program over one model, as words: it prints as Python that makes it again, and each word may go back to plain."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from more_families import DECODERS, ENCODERS, EVERY, MOE, NO_TOKENS, TWO_STACKS

SPOTS = ("block", "norm", "layer", "mlp", "act", "attention", "embeddings", "last norm")

BOTTLENECKS = ("houlsby", "pfeiffer", "parallel")
WORDS: dict[str, tuple[Any, ...]] = {
    "family": tuple(EVERY),
    "layers": (2, 3),
    "precision": ("fp32", "fp64", "bf16", "fp16", "autocast"),
    "cache": ("off", "default", "on", "given"),
    "padding": ("none", "right", "left"),
    "checkpointing": ("none", "non-reentrant", "reentrant"),
    "input_grads": (False, True),
    "recompute": (False, True),
    "compiled": (False, True),
    "trains": ("all", "top", "bottom", "alternate", "random", "one", "lora_B", "lora_A", "norms", "embeddings"),
    "targets": ("all", "attention", "mlp", "odd", "head too", "convolutions too", "experts too"),
    "parts": ("all", "none", "norms", "mlps", "attention", "dropouts"),
    "adapter": ("lora", "dora", "rslora", "dropout", "bias", "head", "two", *BOTTLENECKS),
    "dropout": (0.0, 0.3),
    "hook": (
        *("none", "record", "replace", "in place", "no grad", "data", "vector", "backward", "backward pre", "tensor"),
        *("retain_grad", "input in place", "input no grad", "input data"),
    ),
    "spot": SPOTS,
    "high": (False, True),
    "asks": ("nothing", "hidden", "attentions", "router"),
    "entry": ("model", "backbone", "chunked"),
    "writes": ("nothing", "result", "result no grad", "result data", "embeddings"),
    "change": (
        *(
            "nothing",
            "norm zero",
            "norm tiny",
            "norm scaled",
            "parametrize",
            "parametrize layer",
            "prune",
            "prune layer",
        ),
        *("act_fn", "forward", "class forward", "global hook", "eps", "scaling", "freeze one", "half and back"),
    ),
    "when": ("before", "after", "between"),
    "embeds": ("ids", "leaf", "fresh", "retained"),
    "calls": (
        *("once", "two", "no grad first", "accumulate", "eval between", "eval", "disabled", "again", "autograd.grad"),
        *("step", "inference first"),
    ),
    "seed": (0, 1, 2, 3),
}
"""What each word may be, plain first."""


@dataclass(frozen=True, repr=False)
class Case:
    """A program. See `WORDS` for what each word may be, and program.py for what it does.

    Args:
        family: which model, of so many `layers`.
        precision: of the weights; "autocast" is fp32 under bfloat16 autocast.
        cache: `use_cache` False, as the configuration has it, True, or with a context that is cached before.
        input_grads: whether `enable_input_require_grads` was called.
        trains: which parameters train, by the depth of their block.
        targets: which layers have an adapter; "odd" are some of the attention's and some of the MLP's,
            "head too" adds layers after the blocks, "convolutions too" and "experts too" add those that the model has.
        parts: what `bind` is asked to serve in addition to the adapters.
        dropout: of the model itself; "dropout" as `adapter` is LoRA's own.
        hook: what a hook does at the module `spot` of a low or `high` block.
        asks: what else of the model's result is in the loss.
        entry: whether the model's own loss is taken, `chunked_loss` where stock takes the model's own, or one of the
            backbone's hidden states.
        writes: what the program writes to in place.
        change: what is changed at the model.
        when: whether the hook and the change are made before `bind`, after it, or (a change) between two calls.
        embeds: whether the user makes the embedded input, and a leaf of it.
        calls: which forwards and backwards follow each other.
    """

    family: str = "llama"
    layers: int = 2
    precision: str = "fp32"
    cache: str = "off"
    padding: str = "none"
    checkpointing: str = "none"
    input_grads: bool = False
    recompute: bool = False
    compiled: bool = False
    trains: str = "all"
    targets: str = "all"
    parts: str = "all"
    adapter: str = "lora"
    dropout: float = 0.0
    hook: str = "none"
    spot: str = "block"
    high: bool = False
    asks: str = "nothing"
    entry: str = "model"
    writes: str = "nothing"
    change: str = "nothing"
    when: str = "before"
    embeds: str = "ids"
    calls: str = "once"
    seed: int = 0

    def __repr__(self) -> str:
        return f"Case({', '.join(f'{name}={value!r}' for name, value in self.told().items())})"

    def told(self) -> dict[str, Any]:
        """The words that are not plain."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def simpler(self) -> list[Case]:
        """The same with one word plain, for each word that is not."""
        plain = [sensible(replace(self, **{name: Case.__dataclass_fields__[name].default})) for name in self.told()]
        return [case for case in dict.fromkeys(plain) if case != self]

    @property
    def draws(self) -> bool:
        """Whether random numbers are in it, which stock PEFT's path draws otherwise than ours."""
        return self.dropout > 0 or self.adapter == "dropout"

    @property
    def has_relu(self) -> bool:
        """Whether its adapters have a ReLU, whose gradient may be another one where a number is nearly zero."""
        return self.adapter in BOTTLENECKS and self.seed == 0

    @property
    def places(self) -> bool:
        """Whether a module is named."""
        return self.hook != "none" or self.change != "nothing"


@cache
def sensible(case: Case) -> Case:
    """The nearest program that can be run and means something: where two words do not go together, one is plain."""
    set_to: dict[str, Any] = {}
    if case.family in ENCODERS:
        set_to["cache"] = "off"
    if case.cache == "given" and (case.family not in DECODERS or case.checkpointing != "none" or case.embeds != "ids"):
        set_to["cache"] = "default"
    if case.family in NO_TOKENS:
        set_to |= {"padding": "none", "embeds": "ids"}
    if case.adapter in BOTTLENECKS and case.family in MOE:
        set_to["adapter"] = "lora"
    if case.family not in MOE and case.asks == "router":
        set_to["asks"] = "hidden"
    if case.asks == "router" or case.cache == "given" or case.family in TWO_STACKS:
        set_to["entry"] = "model"
    if case.entry == "chunked" and case.family not in DECODERS:
        set_to["entry"] = "backbone"
    elif case.entry == "chunked":  # its head has no adapter, and no hook sees the calls that compare it
        set_to |= {"asks": "nothing", "writes": "nothing", "hook": "none", "compiled": False}
        set_to |= {"targets": "all"} if case.targets == "head too" else {}
        set_to |= {"adapter": "lora"} if case.adapter == "head" else {}
        set_to |= {"change": "nothing"} if case.change in ("global hook", "class forward") else {}  # of the head too
    if case.checkpointing == "reentrant":  # else stock PEFT trains nothing, with a warning, and ours does
        set_to["input_grads"] = True
    if case.compiled:  # a slow one: nothing that compilers refuse
        set_to |= {"hook": "none", "checkpointing": "none", "change": "nothing", "recompute": False}
        set_to |= {"calls": "once", "adapter": "lora", "dropout": 0.0, "layers": 2}
    if not case.recompute and case.family in ("falcon", "deberta", "cohere", "bart", "olmo2", "granite"):
        set_to["compiled"] = False
    case = replace(case, **set_to)
    if not case.places:
        case = replace(case, spot="block", high=False, when="before")
    if case.change == "nothing" and case.when == "between":
        case = replace(case, when="after")
    if case.trains != "random" and case.adapter not in ("dropout", *BOTTLENECKS):
        case = replace(case, seed=0)
    return case
