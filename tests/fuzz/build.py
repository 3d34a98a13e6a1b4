"""Makes a case's model and batches: the same every time, so that one may be bound and the other not."""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from adapted import randomise
from case import BOTTLENECKS, Case
from families import _vary_norms
from more_families import EVERY, MOE
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import randomise_adapters
from torch import Tensor, nn

from safe_peft.bottleneck import BottleneckConfig

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
AFTER = ("lm_head", "pooler.dense", "classifier.dense", "pre_classifier", "embed_out", "proj_out")
HEADS = ("lm_head", "classifier", "embed_out", "proj_out")
CONVS = (nn.Conv1d, nn.Conv2d)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
PREFIX = 6
ADAPTER = re.compile(r"\.(?:lora|bottleneck)_")


def model_of(case: Case, dtype: torch.dtype | None = None) -> PeftModel:
    """The model in training mode, with adapters that do something."""
    torch.manual_seed(0)
    family = EVERY[case.family]
    base = family.make(case.layers, case.dropout).to(torch.float32)
    if case.asks == "attentions":
        base.set_attn_implementation("eager")
    is_bottleneck = case.adapter in BOTTLENECKS
    config = _bottleneck(case) if is_bottleneck else _lora(case, base)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    if case.adapter == "two":
        model.add_adapter("second", _lora(case, base, r=2))
        model.base_model.set_adapter(["default", "second"])
    randomise(model) if is_bottleneck else randomise_adapters(model)
    _vary_norms(model)
    config = model.get_base_model().config
    if hasattr(config, "use_cache"):
        config.use_cache = case.cache != "off"
    model.train()
    _choose(case, model)
    rounded = DTYPES.get(case.precision, torch.float32)
    model.to(rounded)  # a reference in more digits has the same weights
    if dtype is not None:
        model.to(dtype)
    if case.checkpointing != "none":
        reentrant = case.checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if case.input_grads:
        model.enable_input_require_grads()
    return model


def _bottleneck(case: Case) -> BottleneckConfig:
    kind = ("relu", "gelu", "silu", "gelu_tanh")[case.seed]
    return BottleneckConfig(reduction_factor=4, non_linearity=kind, placement=case.adapter)


def _lora(case: Case, base: nn.Module, r: int = 4) -> LoraConfig:
    family = EVERY[case.family]
    targets = _targets(case, list(family.targets), base)
    options: dict[str, Any] = {"fan_in_fan_out": True} if case.family == "gpt2" else {}
    if case.adapter == "head":
        ends = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        options["modules_to_save"] = [name for name in HEADS if name in ends] or None
    experts = [name for name in EXPERTS if any(path.endswith(name) for path, _ in base.named_parameters())]
    if case.targets == "experts too" and case.adapter in ("lora", "rslora", "head"):  # PEFT has no others there
        options["target_parameters"] = experts or None
    options |= {
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "dropout": {"lora_dropout": 0.3},
        "bias": {"lora_bias": True},
    }.get(case.adapter, {})
    return LoraConfig(r=r, lora_alpha=8, target_modules=targets, **options)


def _targets(case: Case, names: list[str], base: nn.Module) -> list[str]:
    """The layers' names that the case adapts, all of them where the family has no other."""
    mlp = [name for name in names if re.search(r"up|down|gate|fc|wi|wo|4h|lin\d|intermediate|^output|mlp", name)]
    after = [name for name in AFTER if any(path.endswith(name) for path, _ in base.named_modules())]
    convolutions = {path.rsplit(".", 1)[-1] for path, layer in base.named_modules() if isinstance(layer, CONVS)}
    chosen = {
        "attention": [name for name in names if name not in mlp],
        "mlp": mlp,
        "odd": names[1::2],
        "head too": [*names, *after],
        "convolutions too": [*names, *sorted(convolutions)],
    }
    return chosen.get(case.targets) or names


def depth(name: str) -> int:
    """The number of the block that a parameter is in; -1 outside of blocks."""
    found = re.search(r"\.(?:layers?|blocks?|h)\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _choose(case: Case, model: nn.Module) -> None:
    """Freezes what the case does not train."""
    adapters = [(name, p) for name, p in model.named_parameters() if ADAPTER.search(name) and p.requires_grad]
    chance = random.Random(case.seed)
    layers = sorted({ADAPTER.split(name)[0] for name, _ in adapters})
    picked = {layer for layer in layers if chance.random() < 0.4} or {chance.choice(layers)}
    keep = {
        "top": lambda name: depth(name) == case.layers - 1,
        "bottom": lambda name: depth(name) == 0,
        "alternate": lambda name: depth(name) % 2 == 0,
        "random": lambda name: ADAPTER.split(name)[0] in picked,
        "one": lambda name: ADAPTER.split(name)[0] == layers[len(layers) // 3],
        "lora_B": lambda name: not re.search("lora_A|_down", name),
        "lora_A": lambda name: bool(re.search("lora_A|_down", name)),
    }.get(case.trains)
    for name, parameter in adapters:
        parameter.requires_grad_(keep is None or keep(name))
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        if (case.trains == "norms" and is_norm) or (case.trains == "embeddings" and isinstance(module, nn.Embedding)):
            module.requires_grad_(True)


def batch_of(case: Case, number: int = 0, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """One batch; another `number` has other values."""
    batch: dict[str, Any] = dict(EVERY[case.family].batch())
    for name in ("input_ids", "labels"):
        if number and name in batch and batch[name].dim() > 1:
            batch[name] = batch[name].roll(number, 1)
    for name, value in batch.items():
        if value.is_floating_point():
            batch[name] = value.to(dtype or DTYPES.get(case.precision, torch.float32)) * (1 + number)
    if case.padding != "none":
        _pad(batch, case.padding)
    if case.asks == "hidden":
        batch["output_hidden_states"] = True
    elif case.asks == "attentions":
        batch["output_attentions"] = True
    elif case.asks == "router" and case.family in MOE:
        batch["output_router_logits"] = True
    return batch


def _pad(batch: dict[str, Any], side: str) -> None:
    padded = slice(-5, None) if side == "right" else slice(0, 5)
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[0, padded], mask[0, padded] = 0, 0
    batch |= {"input_ids": ids, "attention_mask": mask}
    if batch["labels"].shape == ids.shape:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)


def prefix_of(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch in two: a context to be cached, and what comes after it."""
    first = {"input_ids": batch["input_ids"][:, :PREFIX], "attention_mask": batch["attention_mask"][:, :PREFIX]}
    rest = {**batch, "input_ids": batch["input_ids"][:, PREFIX:], "labels": batch["labels"][:, PREFIX:]}
    return first, rest


def leaf_of(case: Case, model: PeftModel, batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The batch with the embedded input that the user makes, if the case does so."""
    if case.embeds == "ids":
        return batch, None
    with torch.set_grad_enabled(torch.is_grad_enabled() and case.embeds != "fresh"):
        embedded = model.get_input_embeddings()(batch["input_ids"])
    if case.embeds == "fresh":
        embedded = embedded.detach().clone().requires_grad_()
    elif case.embeds == "leaf" and not embedded.requires_grad:
        embedded.requires_grad_()
    if embedded.requires_grad and not embedded.is_leaf:
        embedded.retain_grad()
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    if case.family in ("t5", "t5-gated", "bart"):
        rest["decoder_input_ids"] = batch["input_ids"]
    return {**rest, "inputs_embeds": embedded}, embedded
