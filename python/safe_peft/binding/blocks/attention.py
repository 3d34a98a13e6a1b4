"""Attention that is written in Python, with a position bias (MPNet): SDPA computes it, and recomputes it in backward.

The probabilities are not retained. The sum of mask and bias has the same size, and is retained once for all layers.
Only the lowest layer that trains may retain its probabilities instead of query, key and value: stock PEFT's bytes.
SDPA runs inside `torch.utils.checkpoint`, because it would retain its output too.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..class_swap import original_type
from .base import Part, agrees, is_dropout, is_linear, sample, small_linear, stand_in

_SUM = "_mask_and_bias"
_LAYERS = ("q", "k", "v", "o")
_SIZES = ("num_attention_heads", "attention_head_size")


@dataclass
class Attention(Part):
    """Self-attention of four linear layers, with additive mask and bias.

    Args:
        dropout: name of the dropout on the probabilities.
        arguments: names of the forward's arguments, in order; transformers 4 also has a head_mask.
    """

    stem = "attention"
    dropout: str
    arguments: tuple[str, ...]
    op: str = "scaled_dot_product_attention"

    @property
    def passes_over(self) -> tuple[str, ...]:
        """The dropout. Only the module's own code calls it, and it is bound as a separate part."""
        return (self.dropout,)

    @classmethod
    def recognise(cls, module: nn.Module) -> Attention | None:
        """Recognise four layers with the names q, k, v and o, and a dropout, that compute such an attention."""
        children = module._modules
        dropouts = [name for name, child in children.items() if is_dropout(child)]
        if set(children) != {*_LAYERS, *dropouts} or len(dropouts) != 1 or not all(hasattr(module, n) for n in _SIZES):
            return None
        if not all(is_linear(children[name]) for name in _LAYERS):
            return None
        part = cls(dropouts[0], tuple(inspect.signature(original_type(module).forward).parameters)[1:])
        small: dict[str, nn.Module] = {name: small_linear(4, 4, seed) for seed, name in enumerate(_LAYERS)}
        clone = stand_in(module, children={**small, dropouts[0]: nn.Identity()})
        clone.__dict__ |= {"num_attention_heads": 2, "attention_head_size": 2, "all_head_size": 4}
        x, mask, bias = sample(3, 5, 4), sample(3, 1, 1, 5, seed=1), sample(1, 2, 5, 5, seed=2)
        with torch.no_grad():
            expected = part._attend(clone, x, mask, bias)
        forward = original_type(module).forward
        computes = agrees(lambda: forward(clone, x, attention_mask=mask, position_bias=bias)[0], expected)
        return part if computes else None

    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> tuple[Tensor] | None:
        """Compute a call with SDPA, if this retains less.

        With dropout, SDPA retains the probabilities too. It computes no gradient of a bias.
        """
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        x = given.pop(self.arguments[0], None)
        mask, bias = given.pop("attention_mask", None), given.pop("position_bias", None)
        asks_for_more = any(value is not None and value is not False for value in given.values())
        takes = isinstance(x, Tensor) and x.dim() == 3 and not asks_for_more and self.refusal(module) is None
        dropout = module._modules[self.dropout]
        if not takes or (dropout.training and dropout.p > 0):
            return None
        return None if bias is not None and bias.requires_grad else (self._attend(module, x, mask, bias),)

    def _attend(self, module: nn.Module, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute the attention, from the hidden states to the output layer."""
        layers: Any = [module._modules[name] for name in _LAYERS]
        shape = (*x.shape[:-1], -1, module.attention_head_size)
        given = (*(layer(x).view(shape).transpose(1, 2) for layer in layers[:3]), self._add(mask, bias))
        graphs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in given[:3]]
        if any(graphs) and not all(graphs):  # the lowest layer that trains: running again would retain all three
            out = _written_out(*given)
        elif any(graphs) and not torch.compiler.is_compiling():
            out = checkpoint(_sdpa, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            out = _sdpa(*given)
        return layers[3](out.transpose(1, 2).flatten(2))

    def _add(self, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """Return the sum of mask and bias, one tensor for all layers of a forward, which every layer retains.

        The sum is an attribute of the mask, because the mask exists only during one forward.
        """
        if mask is None or bias is None:
            return bias if mask is None else mask
        if torch.compiler.is_compiling() or mask.is_inference() or bias.is_inference():
            return mask + bias
        given = (id(bias), bias._version, mask._version)
        known = mask.__dict__.get(_SUM)
        if known is None or known[0] != given:
            known = mask.__dict__[_SUM] = (given, mask + bias, bias)  # keeps the bias alive, so that its id stays valid
        return known[1]

    def note(self, module: nn.Module) -> str:
        """Return a remark if the module's own code computes the attention in training."""
        dropout: Any = module._modules[self.dropout]
        return "in training the module's own code runs: attention dropout is on" if dropout.p > 0 else ""


def _written_out(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None) -> Tensor:
    """Compute the formula of SDPA from single operations, which retain only what the needed gradients require."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores if added is None else scores + added).softmax(-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None) -> Tensor:
    added = added if added is None or added.dtype == query.dtype else added.to(query.dtype)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=added)
