"""The loss of a causal language model, without the logits of all tokens in memory at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import safe_kernels

from .check import IGNORED, Head, cast, change, check, parameters, see_one

Loss = Callable[[nn.Module, dict[str, Any]], Any]
_ROWS = 128  # of a chunk, for a head that trains


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return the own loss of a transformers model, or of a PEFT model around one, for a batch with labels."""
    return model(**batch).loss


def chunked_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Compute a causal language model's own loss some tokens at a time, so the complete logits are never in memory.

    The result is the same, to the rounding of the dtype. `safe_kernels.linear_cross_entropy` computes it, and the
    gradient of the hidden states in the same pass. For 2,048 tokens and a vocabulary of 49,152, one copy of the logits
    takes 384 MiB in fp32, and the model's own loss makes several copies. A head that trains runs again in backward.
    The model is called as usual; only its head gets one token instead of all. Every call checks its arguments.
    A new combination of arguments is compared with the model's own logits and loss, on a few tokens. So is the next
    call after a change of the model's configuration or code.

    Args:
        model: a causal language model of transformers, a PEFT model around one, or DDP around that; bound or not.
        batch: the model's arguments by name, with `labels` [samples, tokens]; the label -100 is ignored. With
            `num_items_in_batch`, the sum of the tokens' losses is divided by it, as in transformers.

    Returns:
        The loss, a tensor of one element.

    Raises:
        ConfigError: The batch has no labels, an argument changes the loss in another way,
            the model has no plain linear head, or its loss is not the cross entropy of its logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> tokens = torch.tensor([[1, 2, 3, 4]])
        >>> chunked_loss(model, {"input_ids": tokens, "labels": tokens}).backward()
    """
    head, arguments = check(model, batch), dict(batch)
    labels, items = arguments.pop("labels"), arguments.pop("num_items_in_batch", None)
    return _loss(_hidden(model, head.layer, arguments, labels.shape), head, labels, items)


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


def _loss(hidden: Tensor, head: Head, labels: Tensor, items: Any) -> Tensor:
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(hidden.device)  # the last token of a sample has no target
    weight, bias = parameters(head.layer, hidden.dtype)
    trains = any(p.requires_grad for p in head.layer.parameters())
    losses = _run_again if trains and torch.is_grad_enabled() else safe_kernels.linear_cross_entropy
    total = losses(hidden, weight, bias, targets, scaling=head.scaling, softcap=head.softcap).sum()
    if items is not None:
        return total / (items.to(hidden.device) if isinstance(items, Tensor) else items)
    count = (targets != IGNORED).sum()
    return (total / count.clamp(min=1)).where(count > 0, torch.nan)  # without targets nan, and gradients of zero


def _run_again(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: float) -> Tensor:
    """Compute the losses with gradients for a head that trains: each chunk runs again in backward."""

    def losses(rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(rows, weight, bias)
        changed = change(logits.to(torch.promote_types(logits.dtype, torch.float32)), **options)
        return F.cross_entropy(changed, targets, ignore_index=IGNORED, reduction="none")

    chunks = zip(x.flatten(0, 1).split(_ROWS), target.flatten().split(_ROWS), strict=True)
    # As arguments, the weights are saved, so a write to them before backward is an error, as for the model's own loss.
    again = partial(checkpoint, losses, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*chunk, weight, bias) for chunk in chunks])


BY_NAME: dict[str, Loss] = {"model": own_loss, "chunked": chunked_loss}
"""The values of the command line's `--loss`."""
