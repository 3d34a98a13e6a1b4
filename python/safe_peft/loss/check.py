"""Checks that a chunked loss equals the model's own loss in a call: arguments, logits, and the loss on a few tokens."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from ..binding.blocks.trains import waits_for_gradient
from ..binding.class_swap import autocasts
from ..distributed.fsdp import is_spread
from ..distributed.wrappers import unwrap
from ..errors import ConfigError

CHECKED_TOKENS = 32
IGNORED = -100  # the target that PyTorch's cross entropy ignores
_PLAIN = (bool, int, float, str, type(None))
_INPUTS = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "cache_position", "is_causal"),
    *("past_key_values", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
)
"""Arguments that the hidden states depend on, and that no loss reads."""
_CONTEXT = ("past_key_values", "attention_mask", "position_ids", "cache_position")
_NEUTRAL = {"ignore_index": IGNORED, "logits_to_keep": 0, "output_router_logits": False, "shift_labels": None}
"""Arguments that change a loss or its inputs, unless they have these values."""
_MAKES_HIDDEN = ("pixel_", "image_", "video_", "input_", "mm_token")
"""Prefixes of the names of tensors with images and audio."""
_INSTEAD = "use the model's own loss"
_LARGE, _SHORT = 50.0, 4
_AS_IF = 7
"""The value of `num_items_in_batch` in a comparison."""
_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, set[Any]]] = weakref.WeakKeyDictionary()
"""Of each model: its state, and the calls that were compared in this state."""


class Head(NamedTuple):
    """A model's last layer, and the model's changes of its logits: a factor, then a soft cap (0 for none)."""

    layer: nn.Linear
    scaling: float
    softcap: float


def change(logits: Tensor, scaling: float, softcap: float) -> Tensor:
    """Return the logits after the model's changes."""
    logits = logits * scaling if scaling != 1.0 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def check(model: nn.Module, batch: Mapping[str, Any]) -> Head:
    """Check that `chunked_loss` equals the model's own loss in a call, and return the model's head.

    A call with new arguments is compared on a few of its tokens. If the two losses differ, or the model or an argument
    is not supported, this raises a ConfigError.
    """
    inner = unwrap(model)
    base: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[operator]
    head, labels = _head(base), batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        got = f"of shape {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ConfigError(f"batch: expected labels of shape [samples, tokens], got {got}.")
    _refuse_arguments(inner, base, batch)
    if isinstance(labels, FakeTensor):
        return head
    call, state = _call(base, batch), _state(inner, base, head.layer)
    known = _CHECKED.get(base)
    if known is None or known[0] != state:
        known = _CHECKED[base] = (state, set())
    if call not in known[1] and labels.shape[1] > 1:  # one token per sample has no target, and so no loss
        _compare(inner, base, head, batch)
        if call is not None:
            known[1].add(call)
    return head


def _refuse_arguments(inner: Any, base: Any, batch: Mapping[str, Any]) -> None:
    """Refuse arguments that change the loss: the loss function also gets arguments that the forward does not name."""
    named = {*inspect.signature(base.forward).parameters, *getattr(inner, "special_peft_forward_args", ()), *_INPUTS}
    for name, value in batch.items():
        if name in _NEUTRAL and not (value is None or (type(value) in _PLAIN and value == _NEUTRAL[name])):
            wanted = f"expected {_NEUTRAL[name]!r}"
        elif name not in {*named, *_NEUTRAL, "labels", "num_items_in_batch"} and value is not None:
            wanted = f"{type(base).__name__}.forward does not name it, so it may change the loss"
        else:
            continue
        got = f"a {type(value).__name__}" if not isinstance(value, _PLAIN) else repr(value)
        raise ConfigError(f"batch: the chunked loss does not support {name}: {wanted}, got {got}; {_INSTEAD}.")
    items = batch.get("num_items_in_batch")
    if items is not None and (items.numel() != 1 if isinstance(items, Tensor) else type(items) not in (int, float)):
        raise ConfigError(f"batch: expected a number in num_items_in_batch, got {items!r}.")
    asked = batch.get("output_router_logits") is not None
    if not asked and any(config.get("output_router_logits") for config in _configs(base)):
        raise ConfigError(
            f"loss: chunked does not add the routers' loss, and the config of {type(base).__name__} has "
            f"output_router_logits=True; set it to False, or {_INSTEAD}."
        )


def _call(base: Any, batch: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return a call's key; None if the loss may depend on values that differ in the next call with the same key."""
    if base._parameters or base._buffers:
        return None  # the model may scale its logits by them
    found: list[Any] = [base.training]
    for name, value in sorted(batch.items()):
        if isinstance(value, _PLAIN) and name != "num_items_in_batch":
            found.append((name, value))
        elif name.startswith(_MAKES_HIDDEN) or name in (*_INPUTS, "labels", "num_items_in_batch"):
            found.append((name, type(value), value.dim() if isinstance(value, Tensor) else 0))
        else:
            return None
    return tuple(found)


def _configs(base: Any) -> list[dict[str, Any]]:
    """Return the values of a model's config and of the configs in it."""
    own = getattr(getattr(base, "config", None), "__dict__", {})
    return [dict(own), *(dict(value.__dict__) for value in own.values() if hasattr(value, "to_dict"))]


def _state(inner: Any, base: Any, head: nn.Module) -> tuple[Any, ...]:
    """Return the model's state that logits and loss depend on: code, settings, and hooks on the model and its head."""
    found: list[Any] = [*_configs(base), id(head), _reference(getattr(base, "loss_function", None))]
    for module in dict.fromkeys((inner, base, head)):
        own = module.__dict__
        found += [_reference(type(module).forward), tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"])]
        found += [(name, id(child), type(child)) for name, child in own["_modules"].items()]
        settings = {name: value for name, value in own.items() if name != "training"}
        found += [(name, value) for name, value in settings.items() if isinstance(value, _PLAIN)]
        found += [(name, _reference(value)) for name, value in settings.items() if callable(value)]
    return tuple(found)


def _reference(function: Any) -> Any:
    """Return a weak reference to a function, for comparisons: the function may refer to the model."""
    function = getattr(function, "__func__", function)
    return function if function is None else weakref.ref(function)


def _head(base: Any) -> Head:
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"loss: chunked is for decoders, but {type(base).__name__} has an encoder; {_INSTEAD}.")
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear or is_spread(head.weight):
        got = "one that is sharded over processes" if type(head) is nn.Linear else type(head).__name__
        raise ConfigError(
            f"loss: chunked needs a model whose head is a plain torch.nn.Linear, got {got} in {type(base).__name__}; "
            f"{_INSTEAD}."
        )
    if waits_for_gradient([head]):
        raise ConfigError(f"loss: chunked does not call the head in backward, and it has a backward hook; {_INSTEAD}.")
    scale, divisor, cap = (
        _setting(base, name) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    return Head(head, (scale or 1.0) / (divisor or 1.0), cap)  # Cohere, Granite, Gemma 2: the comparison checks it


def _setting(base: Any, name: str) -> float:
    """Return a number of a model's config, or of a config in it; 0 if there is none."""
    return next((float(config[name]) for config in _configs(base) if config.get(name)), 0.0)


def cast(hidden: Tensor) -> Tensor:
    """Cast the head's input to the dtype of the head's product; call it inside the model's forward.

    accelerate uses autocast only there.
    """
    return hidden.to(torch.get_autocast_dtype(hidden.device.type)) if autocasts(hidden) else hidden


def see_one(found: list[Tensor], shape: torch.Size) -> None:
    """Check that the head was called once, with the hidden states of every token of labels of this shape."""
    if len(found) != 1:
        raise ConfigError(f"loss: chunked needs a model that calls its head once, got {len(found)} calls.")
    if found[0].shape[:2] != shape:
        got = f"{list(found[0].shape[:2])} for labels {list(shape)}"
        raise ConfigError(f"loss: chunked needs hidden states of every token for the head, got {got}; {_INSTEAD}.")


def parameters(head: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a head's weight and bias in the dtype of its product."""
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def _compare(inner: nn.Module, base: nn.Module, head: Head, batch: Mapping[str, Any]) -> None:
    """Check on a few tokens that the model's logits are its head's output, and its loss their cross entropy.

    The check uses the whole batch if a part of it, such as an image, cannot be cut. It runs in inference mode, so that
    a freezer does not take it for a training batch. The head's output is scaled up, which reveals a cap on the logits.
    """
    small, targets = _few(batch)
    devices = [targets.device] if targets.device.type == "cuda" else []
    given: list[Tensor] = []
    made: list[tuple[Tensor, Tensor]] = []

    def enlarge(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        given.append(cast(args[0]))
        made.append((out, out * (_LARGE / out.abs().max().clamp(min=1e-6))))
        return made[-1][1]

    with torch.inference_mode(), _evaluating(inner, base), torch.random.fork_rng(devices=devices):
        with head.layer.register_forward_hook(enlarge):
            own = inner(**small, labels=targets)
        see_one(given, targets.shape)
        hidden, (out, enlarged) = given[0], made[0]
        plain = F.linear(hidden, *parameters(head.layer, hidden.dtype))
        logits = change(enlarged, head.scaling, head.softcap)
        mean = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)
    items = small.get("num_items_in_batch")
    loss = float(mean) * (1.0 if items is None else int((targets[:, 1:] != IGNORED).sum()) / _AS_IF)
    close = 1e-4 if hidden.dtype in (torch.float32, torch.float64) else 2e-2
    same_logits = _agree(plain, out, close) and _agree(own.logits, logits, 1e-6 if logits is enlarged else close)
    close = 2e-6 if own.loss.dtype in (torch.float32, torch.float64) else 2e-2
    if not (same_logits and abs(float(own.loss) - loss) <= close * max(1.0, abs(loss))):
        what = "losses" if same_logits else "logits"
        raise ConfigError(
            f"loss: chunked differs from the loss of {type(base).__name__}, whose {what} are not those of its head and "
            f"a cross entropy (on a few tokens its own loss is {float(own.loss):.4f}, chunked {loss:.4f}); {_INSTEAD}."
        )


def _agree(one: Any, other: Tensor, close: float) -> bool:
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    return float((one.float() - other.float()).abs().max()) <= close * float(other.float().abs().max())


def _few(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return a few tokens of two samples. One token has no target, and the last tokens are masked but have a target.

    This shows whether the loss is a mean over tokens or over samples, and whether it ignores masked tokens.
    """
    labels = batch["labels"]
    rest = {name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")}
    if rest.get("past_key_values") is not None:  # the call would add to this cache, and the comparison does not need it
        rest = {name: value for name, value in rest.items() if name not in _CONTEXT}
    tensors = [value for value in rest.values() if isinstance(value, Tensor)]
    few = (slice(2), slice(CHECKED_TOKENS)) if all(t.shape[:2] == labels.shape for t in tensors) else ...
    small = {name: value[few] if isinstance(value, Tensor) else value for name, value in rest.items()}
    targets = labels[few].clamp(min=0)
    if targets.shape[1] > _SHORT:
        targets[-1, 1] = IGNORED
        mask = small.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == targets.shape:
            small["attention_mask"] = mask.clone().index_fill_(1, mask.new_tensor([-1], dtype=torch.long), 0)
    if (items := batch.get("num_items_in_batch")) is not None:
        small["num_items_in_batch"] = torch.full_like(items, _AS_IF) if isinstance(items, Tensor) else _AS_IF
    return small, targets


@contextmanager
def _evaluating(model: nn.Module, base: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode, except the model itself, whose mode the loss may read; restore them later."""
    modes = [(module, module.training) for module in model.modules()]
    training = base.training
    model.eval()
    model.training = base.training = training
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
