"""What a case does to a model: hooks, writes in place, changed values and changed code; all undone at the end."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from case import Case
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from build import depth


@dataclass
class Seen:
    """What hooks saw, in order, and the tensors of a user that train."""

    tensors: list[Tensor] = field(default_factory=list)
    in_loss: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


def spot_of(case: Case, model: nn.Module, spot: str | None = None) -> tuple[str, nn.Module]:
    """The module that a case names, in the lowest or in the highest block."""
    spot = spot or case.spot
    modules = [(name, module) for name, module in model.named_modules() if not name.endswith("base_layer")]
    if spot == "embeddings":
        return spot, model.get_input_embeddings()
    named = {
        "block": lambda name, module: depth(f"{name}.x.") >= 0 and name.rsplit(".", 1)[-1].isdigit(),
        "norm": lambda name, module: depth(name + ".") >= 0 and _is_norm(module),
        "last norm": lambda name, module: depth(name + ".") < 0 and _is_norm(module),
        "layer": lambda name, module: isinstance(module, BaseTunerLayer),
        "act": lambda name, module: depth(name + ".") >= 0 and not _holds_anything(module),
        "attention": lambda name, module: name.lower().endswith(("attn", "attention", "selfattention")),
        "mlp": lambda name, module: type(module).__name__.lower().endswith(("mlp", "densereludense", "intermediate")),
    }
    found = [pair for pair in modules if named[spot](*pair)]
    found = found or [pair for pair in modules if _is_norm(pair[1])]
    return found[-1 if case.high else 0]


def _holds_anything(module: nn.Module) -> bool:
    return bool(list(module.children()) or list(module.parameters()) or list(module.buffers()))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children()) and bool(list(module.parameters()))


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else next(iter(value.values() if isinstance(value, dict) else value))


def _with_first(value: Any, tensor: Tensor) -> Any:
    return tensor if isinstance(value, Tensor) else type(value)((tensor, *value[1:]))


def add_hook(case: Case, model: nn.Module, seen: Seen) -> None:
    """Registers what the case hooks."""
    name, module = spot_of(case, model)
    if case.hook == "vector":
        width = model.get_input_embeddings().weight.shape[-1] if case.spot != "mlp" else 1
        seen.leaves.append(nn.Parameter(torch.full((1 if case.spot == "layer" else width,), 0.1)))
    if case.hook == "backward":
        module.register_full_backward_hook(lambda m, grads, outs: _note(seen, name, "backward", (*grads, *outs)))
        _note_order(model, seen)
    elif case.hook == "backward pre":
        module.register_full_backward_pre_hook(lambda m, outs: _note(seen, name, "backward pre", outs))
    elif case.hook.startswith("input"):
        module.register_forward_pre_hook(lambda m, args, kwargs: _write_input(case, args, kwargs), with_kwargs=True)
    elif case.hook != "none":
        module.register_forward_hook(lambda m, args, out: _after(case, seen, name, out))


def _note(seen: Seen, name: str, what: str, values: Any) -> None:
    seen.events.append(f"{what} {name}: {[None if value is None else tuple(value.shape) for value in values]}")
    seen.tensors += [value.detach().clone() for value in values if value is not None]


def _note_order(model: nn.Module, seen: Seen) -> None:
    """When the adapters of the lowest layer get their gradients is part of what happens."""
    first = ("lora_A", "bottleneck_down")
    trained = [(n, p) for n, p in model.named_parameters() if any(part in n for part in first) and p.requires_grad]
    if trained:
        name, parameter = trained[0]
        parameter.register_post_accumulate_grad_hook(lambda p: seen.events.append(f"gradient {name}"))


def _write_input(case: Case, args: Any, kwargs: Any) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    if tensors:
        scale(tensors[0], case.hook.removeprefix("input "))


def scale(tensor: Tensor, how: str) -> None:
    """Writes to a tensor: noted in the graph, counted as a version, or neither."""
    with torch.no_grad() if how == "no grad" else nullcontext():
        (tensor.data if how == "data" else tensor).mul_(1.25)


def _after(case: Case, seen: Seen, name: str, out: Any) -> Any:
    tensor = _first(out)
    if case.hook == "record":
        seen.in_loss.append(tensor)
    elif case.hook in ("in place", "no grad", "data"):
        scale(tensor, case.hook)
    elif case.hook == "replace":
        return _with_first(out, tensor * 1.25)
    elif case.hook == "vector":
        return _with_first(out, tensor + seen.leaves[0].to(tensor.dtype))
    elif case.hook == "tensor" and tensor.requires_grad:
        tensor.register_hook(lambda grad: _note(seen, name, "tensor", (grad,)))
    elif case.hook == "retain_grad" and tensor.requires_grad:
        tensor.retain_grad()
        seen.leaves.append(tensor)
    return None


class _Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2.0


def change(case: Case, model: nn.Module, undo: ExitStack) -> None:
    """Makes the case's change to the model."""
    _, module = spot_of(case, model)
    _, norm = spot_of(case, model, "norm")
    _, layer = spot_of(case, model, "layer")
    if case.change in VALUES:
        VALUES[case.change](norm, layer, model)
    elif case.change.startswith("parametrize"):
        target = norm if case.change == "parametrize" else layer.get_base_layer()
        parametrize.register_parametrization(target, "weight", _Twice())
    elif case.change.startswith("prune"):
        target = norm if case.change == "prune" else layer.get_base_layer()
        prune.l1_unstructured(target, "weight", amount=0.3)
    elif case.change == "act_fn":
        _exchange_activations(model)
    elif case.change == "forward":
        own = module.forward
        module.forward = lambda *args, **kwargs: _scaled(own(*args, **kwargs))
    elif case.change == "class forward":
        kind = next(cls for cls in type(module).__mro__ if "forward" in vars(cls) and "safe_peft" not in cls.__module__)
        original = kind.forward
        undo.enter_context(patch.object(kind, "forward", lambda *args, **kwargs: _scaled(original(*args, **kwargs))))
    elif case.change == "global hook":
        wanted = type(module).__name__
        hooked = nn.modules.module.register_module_forward_hook(
            lambda m, args, out: _scaled(out) if type(m).__name__ == wanted else None
        )
        undo.callback(hooked.remove)


def _scaled(out: Any) -> Any:
    return _with_first(out, _first(out) * 1.25)


def _exchange_activations(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__.lower()
            if kind.endswith(("activation", "silu", "relu", "gelu", "gelutanh")) and not list(child.children()):
                setattr(parent, name, nn.Tanh())


def _eps(norm: nn.Module, layer: nn.Module, model: nn.Module) -> None:
    for name in ("eps", "variance_epsilon"):
        if hasattr(norm, name):
            setattr(norm, name, 0.1)


def _zero(norm: nn.Module, layer: nn.Module, model: nn.Module) -> None:
    norm.weight.data[0] = 0.0


def _half_and_back(norm: nn.Module, layer: nn.Module, model: nn.Module) -> None:
    dtype = norm.weight.dtype
    norm.weight.data[:3] = 1e-9  # nothing in half precision
    gradients = {p: p.grad for p in model.parameters()}
    for parameter in gradients:
        parameter.grad = None  # rounded too, it would differ in a digit of fp16 where it did in the last of fp32
    model.half().to(dtype)
    for parameter, grad in gradients.items():
        parameter.grad = grad


def _scaling(norm: nn.Module, layer: nn.Module, model: nn.Module) -> None:
    layer.scaling = {name: value * 2 for name, value in layer.scaling.items()}


def _freeze_one(norm: nn.Module, layer: nn.Module, model: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if "lora_" in name or "bottleneck_" in name:
            parameter.requires_grad_(False)


VALUES = {
    "norm zero": _zero,
    "norm tiny": lambda norm, layer, model: norm.weight.data[:3].mul_(1e-12),
    "norm scaled": lambda norm, layer, model: norm.weight.data.mul_(1.5),
    "eps": _eps,
    "scaling": _scaling,
    "freeze one": _freeze_one,
    "half and back": _half_and_back,
}
