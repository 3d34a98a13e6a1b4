"""The loss of a causal language model, without the logits of all tokens in memory at the same time."""

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
    """Return the own loss of a transformers model, or of a PEFT model around one, for a batch with labels."""
    return model(**batch).loss


def chunked_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Compute a causal language model's own loss some tokens at a time, so the complete logits are never in memory.

    The result is the same, to the rounding of the dtype. PyTorch's `linear_cross_entropy` computes it. For 2,048 tokens
    and a vocabulary of 49,152, one copy of the logits takes 384 MiB in fp32, and the model's own loss makes several
    copies. The model is called as usual; only its head gets one token instead of all. Every call checks its arguments.
    A new combination of arguments is compared with the model's own logits and loss, on a few tokens. So is the next
    call after a change of the model's configuration or code.

    Args:
        model: a causal language model of transformers, a PEFT model around one, or DDP around that; bound or not.
        batch: the model's arguments by name, with `labels` [samples, tokens]; the label -100 is ignored. With
            `num_items_in_batch`, the sum of the tokens' losses is divided by it, as in transformers.

    Returns:
        The loss, a tensor of one element. For a model in bf16 the loss is rounded to bf16 when gradients are computed;
        the gradients are not.

    Raises:
        ConfigError: PyTorch is older than 2.13, the batch has no labels, an argument changes the loss in another way,
            the model has no plain linear head, or its loss is not the cross entropy of its logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> tokens = torch.tensor([[1, 2, 3, 4]])
        >>> loss = chunked_loss if hasattr(torch.nn, "LinearCrossEntropyOptions") else own_loss  # torch >= 2.13
        >>> loss(model, {"input_ids": tokens, "labels": tokens}).backward()
    """
    head, arguments = check(model, batch), dict(batch)
    labels, items = arguments.pop("labels"), arguments.pop("num_items_in_batch", None)
    return _loss(_hidden(model, head, arguments, labels.shape), head, labels, items)


def _hidden(model: nn.Module, head: nn.Linear, arguments: dict[str, Any], shape: torch.Size) -> Tensor:
    """Return the head's input, in the dtype of its product; the head itself computes only the last token's logits."""
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
        losses = compute(reduction="none")  # a mean in bf16 is rounded; without gradients, single losses cost the same
        mean = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)) / (targets != IGNORED).sum()
    return mean if items is None else mean * (count / items)


def _flops(rows: torch.Size, weight: torch.Size, *others: Any, out_shape: Any = None) -> int:
    """Count the FLOPs of PyTorch's chunked op: the logits, and the gradients that the same op computes."""
    products = 1 + sum(map(bool, others[10:12]))
    return 2 * rows[0] * weight[0] * weight[1] * products


def flop_formulas() -> dict[Any, Any]:
    """Return the formulas with which `torch.utils.flop_counter` counts a loss in chunks."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return {}
    one = torch.zeros(1, 1)  # the op is registered when it is first called
    F.linear_cross_entropy(one, one, torch.zeros(1, dtype=torch.long), options=torch.nn.LinearCrossEntropyOptions())
    op = getattr(torch.ops.torch_nn, "_linear_cross_entropy_batch_chunked", None)
    return {} if op is None else {op: _flops}


BY_NAME: dict[str, Loss] = {"model": own_loss, "chunked": chunked_loss}
"""The values of the command line's `--loss`."""
