"""The loss of a causal language model without the logits of all its tokens at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .check import IGNORED, cast, check, parameters, see_one

Loss = Callable[[nn.Module, dict[str, Any]], Any]


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
    as always, but for its head. The arguments of every call are looked at. Each new combination of them is compared,
    on a few tokens, with the model's own logits and loss, and again when the model's configuration or code changes.

    Args:
        model: a causal language model of transformers, PEFT's around one, or DDP's around that; bound or not.
        batch: the model's arguments by name, with `labels` [rows, tokens]; -100 is left out. With `num_items_in_batch`
            the sum of the tokens' losses is divided by that, as transformers does.

    Returns:
        The loss, of one element. Of a model in bf16 it is rounded to bf16 where gradients are taken; they are not.

    Raises:
        ConfigError: PyTorch is older than 2.13, the batch has no labels, an argument changes the loss in another way,
            or the model has no plain linear head, or does something else with its logits than a cross entropy.

    Example:
        >>> chunked_loss(model, batch).backward()  # doctest: +SKIP
    """
    head, arguments = check(model, batch), dict(batch)
    labels, items = arguments.pop("labels"), arguments.pop("num_items_in_batch", None)
    return _loss(_hidden(model, head, arguments, labels.shape), head, labels, items)


def _hidden(model: nn.Module, head: nn.Linear, arguments: dict[str, Any], shape: torch.Size) -> Tensor:
    """What the head is given, in the dtype it would compute in; of that it computes the last token's logits alone."""
    found: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(cast(args[0]))
        return (args[0][:, -1:].detach(), *args[1:])

    with head.register_forward_pre_hook(take):
        model(**arguments)
    see_one(found, shape)
    return found[0]


def _loss(hidden: Tensor, head: nn.Linear, labels: Tensor, items: Any) -> Tensor:
    rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
    count = (targets != IGNORED).sum()
    if items is not None:  # a sum, of nothing too; a mean times its count does not overflow in fp16
        first = torch.arange(len(targets), device=targets.device) == 0
        targets = targets.masked_fill(first & (count == 0), 0)
        items = items.to(hidden.device) if isinstance(items, Tensor) else items
    weight, bias = parameters(head, hidden.dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    compute = partial(F.linear_cross_entropy, rows, weight, targets, linear_bias=bias, options=options)
    if torch.is_grad_enabled():
        mean = compute()
    else:
        losses = compute(reduction="none")  # a mean in bf16 is rounded; without gradients these cost no more
        mean = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)) / (targets != IGNORED).sum()
    return mean if items is None else mean * (count / items)


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
