"""Runs a block whose adapters are all frozen without retaining anything but its inputs, and once more in backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

_CACHES = ("past_key_values", "past_key_value", "layer_past")


def recompute(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a block that trains nothing, retaining its tensor arguments alone; what it retains now is gone at once.

    Exact: dropout draws the same numbers the second time, and autocast is as it was. Where the block draws random
    numbers their generator's state is retained too (5,056 bytes on a CPU).

    Args:
        call: the block. Nothing it reads beside its arguments may require grad.
        args: its arguments, some of which require grad.
        kwargs: likewise. A cache of keys and values is taken away, since the second call would add to it again.

    Returns:
        What it returns.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> recompute(torch.sin, (x,), {}).sum().backward()
        >>> torch.equal(x.grad, torch.cos(x.detach()))
        True
    """
    clean = {name: None if name in _CACHES else False if name == "use_cache" else v for name, v in kwargs.items()}
    leaves, spec = tree_flatten((tuple(args), clean))
    run = _Run(call, spec, leaves)
    outputs = _Recomputed.apply(run, *run.tensors(leaves))
    return run.rebuild(outputs)


class _Run:
    """How to call the block: everything but the tensors."""

    def __init__(self, call: Callable[..., Any], spec: Any, leaves: list[Any]) -> None:
        self.call, self.spec = call, spec
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        self.autocast = (torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device))
        self.out_spec: Any = None
        self.out_leaves: list[Any] = []

    def tensors(self, leaves: list[Any]) -> list[Tensor]:
        return [leaves[index] for index in self.places]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The block's tensor results, in order."""
        leaves = list(self.constants)
        for index, tensor in zip(self.places, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        self.out_leaves, self.out_spec = tree_flatten(self.call(*args, **kwargs))
        results = tuple(leaf for leaf in self.out_leaves if isinstance(leaf, Tensor))
        self.out_leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in self.out_leaves]
        return results

    def rebuild(self, outputs: Sequence[Tensor]) -> Any:
        """The block's own kind of result from its tensors."""
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if leaf is None else leaf[0] for leaf in self.out_leaves], self.out_spec)

    @contextmanager
    def as_before(self, states: Sequence[Tensor], devices: Sequence[int]) -> Any:
        """The random state and the autocast of the first call."""
        enabled, dtype = self.autocast
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device, dtype=dtype, enabled=enabled))
            if states:
                stack.enter_context(torch.random.fork_rng(devices=list(devices), device_type=_fork_device(self.device)))
                torch.set_rng_state(states[0])
                if devices:
                    set_device_states(list(devices), list(states[1:]), device_type=self.device)
            yield


def _fork_device(device: str) -> str:
    """`fork_rng` saves the CPU's state in any case, and wants an accelerator's name beside it."""
    return "cuda" if device == "cpu" else device


class _Recomputed(torch.autograd.Function):
    """Saves the arguments, and the generators' states if the block has drawn from them."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        before = torch.get_rng_state()
        devices, states = get_device_states(*tensors)
        outputs = run(tensors)
        drew = not torch.equal(before, torch.get_rng_state()) or bool(devices)
        ctx.run, ctx.devices = run, devices if drew else []
        kept = [before, *states] if drew else []
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, states = saved[: ctx.count], saved[ctx.count :]
        wanted = ctx.needs_input_grad[1:]
        again = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        with ctx.run.as_before(states, ctx.devices):
            outputs = ctx.run(again)
        pairs = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad
        ]
        inputs = [tensor for tensor, want in zip(again, wanted, strict=True) if want]
        results = iter(
            torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
            if pairs
            else [None] * len(inputs)
        )
        return (None, *(next(results) if want else None for want in wanted))
