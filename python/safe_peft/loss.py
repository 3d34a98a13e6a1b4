"""The loss of a causal language model without the logits of all its tokens at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from .batches import IGNORED
from .errors import ConfigError
from .parallel.fsdp import is_spread
from .paths import unwrap

CHECKED_TOKENS = 32
Loss = Callable[[nn.Module, dict[str, Any]], Any]
_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return what the model itself says its loss is.

    Args:
        model: of transformers, or PEFT's around one.
        batch: the model's arguments by name, with labels.

    Example:
        >>> own_loss(model, batch).backward()  # doctest: +SKIP
    """
    return model(**batch).loss


def chunked_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Compute a causal language model's own loss some tokens at a time, so that whole logits are never in memory.

    The same number to the rounding of the dtype, by PyTorch's `linear_cross_entropy`. For 2,048 tokens and a vocabulary
    of 49,152 one copy of the logits takes 384 MiB in fp32, and the model's own loss makes several. The model is called
    as always, but for its head. At a model's first call its own logits and loss on a few tokens are compared with
    this function's: one that caps or scales its logits, or adds to its loss, is refused and not trained wrong.

    Args:
        model: a causal language model of transformers, PEFT's around one, or DDP's around that; bound or not.
        batch: the model's arguments by name, with `labels` [rows, tokens]; -100 is left out.

    Returns:
        The loss, of one element. Of a model in bf16 it is rounded to bf16 where gradients are taken; they are not.

    Raises:
        ConfigError: PyTorch is older than 2.13, the batch has no labels, or the model has no plain linear head, or does
            something else with its logits than a cross entropy.

    Example:
        >>> chunked_loss(model, batch).backward()  # doctest: +SKIP
    """
    head, arguments = check(model, batch), dict(batch)
    labels = arguments.pop("labels")
    return _loss(_hidden(model, head, arguments), head, labels)


def check(model: nn.Module, batch: Mapping[str, Any]) -> nn.Linear:
    """See, once a model, that `chunked_loss` is its own loss, and return its head.

    Args:
        model: as `chunked_loss` takes it.
        batch: likewise; a few tokens of it are tried.

    Raises:
        ConfigError: It is not, or cannot be.

    Example:
        >>> check(model, batch)  # doctest: +SKIP
    """
    inner = unwrap(model)
    base: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[operator]
    head, labels = _head(base), batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        got = f"of shape {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ConfigError(f"batch: expected labels [rows, tokens] in it, got {got}.")
    if base not in _CHECKED and not isinstance(labels, FakeTensor):
        _compare(base, head, {name: value for name, value in batch.items() if name != "labels"}, labels)
        _CHECKED.add(base)
    return head


def _head(base: Any) -> nn.Linear:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ConfigError(f"loss: chunked needs torch >= 2.13, got {torch.__version__}; take the model's own loss.")
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            f"loss: chunked is for decoders, but {type(base).__name__} has an encoder; take the model's own loss."
        )
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear or is_spread(head.weight):
        got = "one that is spread over processes" if type(head) is nn.Linear else type(head).__name__
        raise ConfigError(
            f"loss: chunked needs a model whose head is a plain torch.nn.Linear, got {got} in {type(base).__name__}; "
            "take the model's own loss."
        )
    return head


def _hidden(model: nn.Module, head: nn.Linear, arguments: dict[str, Any]) -> Tensor:
    """What the head is given, in the dtype it would compute in; of that it computes the last token's logits alone."""
    found: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kind = args[0].device.type  # accelerate has autocast on within the model alone
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else args[0].dtype
        found.append(args[0].to(dtype))
        return (args[0][:, -1:].detach(), *args[1:])

    with head.register_forward_pre_hook(take):
        model(**arguments)
    if len(found) != 1:
        raise ConfigError(f"loss: chunked needs a model that calls its head once, got {len(found)} calls.")
    return found[0]


def _parameters(head: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def _loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
    weight, bias = _parameters(head, hidden.dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    compute = partial(F.linear_cross_entropy, rows, weight, targets, linear_bias=bias, options=options)
    if torch.is_grad_enabled():
        return compute()
    losses = compute(reduction="none")  # a mean in bf16 is rounded; without gradients these cost no more
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)) / (targets != IGNORED).sum()


def _compare(base: nn.Module, head: nn.Linear, arguments: dict[str, Any], labels: Tensor) -> None:
    """Whether the model's own logits and loss are what this file takes them for, on a few tokens of a batch.

    On the whole batch if something in it, such as a picture, cannot be cut. In inference mode, so that whoever watches
    a training takes it for none of its batches.
    """
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    few = (slice(1), slice(CHECKED_TOKENS)) if all(t.shape[:2] == labels.shape for t in tensors) else ...
    small = {name: value[few] if isinstance(value, Tensor) else value for name, value in arguments.items()}
    targets = labels[few].clamp(min=0)
    devices = [labels.device] if labels.device.type == "cuda" else []
    with torch.inference_mode(), _evaluating(base), torch.random.fork_rng(devices=devices):
        own = base(**small, labels=targets)
        hidden = _hidden(base, head, small)
        logits, loss = F.linear(hidden, *_parameters(head, hidden.dtype)), _loss(hidden, head, targets)
    close = 1e-4 if hidden.dtype in (torch.float32, torch.float64) else 2e-2
    bound = close * float(own.logits.float().abs().max())
    same_logits = own.logits.shape == logits.shape and float((own.logits.float() - logits.float()).abs().max()) <= bound
    if not (same_logits and abs(float(own.loss) - float(loss)) <= close * max(1.0, abs(float(own.loss)))):
        what = "losses" if same_logits else "logits"
        raise ConfigError(
            f"loss: chunked would train another model than {type(base).__name__}, whose {what} are not those of its "
            f"head and a cross entropy (on a few tokens its loss is {float(own.loss):.4f}, chunked {float(loss):.4f}); "
            "take the model's own loss."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module as in evaluation, and afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _flops(rows: torch.Size, weight: torch.Size, *others: Any, out_shape: Any = None) -> int:
    """Of PyTorch's op in chunks, which is one op to its counter: logits, and the gradients that it makes with them."""
    products = 1 + sum(map(bool, others[10:12]))
    return 2 * rows[0] * weight[0] * weight[1] * products


def flop_formulas() -> dict[Any, Any]:
    """Return what `torch.utils.flop_counter` has to be told to count a loss in chunks.

    Example:
        >>> FlopCounterMode(custom_mapping=flop_formulas())  # doctest: +SKIP
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return {}
    one = torch.zeros(1, 1)  # the op is registered when it is first called
    F.linear_cross_entropy(one, one, torch.zeros(1, dtype=torch.long), options=torch.nn.LinearCrossEntropyOptions())
    op = getattr(torch.ops.torch_nn, "_linear_cross_entropy_batch_chunked", None)
    return {} if op is None else {op: _flops}


BY_NAME: dict[str, Loss] = {"model": own_loss, "chunked": chunked_loss}
"""What `--loss` takes; `options.LOSSES` are the same names."""
