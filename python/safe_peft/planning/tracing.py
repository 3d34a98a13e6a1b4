"""Runs one training step on a copy of a model without values, and records retained bytes and peak memory.

Nothing is estimated by formulas. The code of the model, of PEFT and of this package runs as in training, and every
saved tensor is recorded. So the plan is correct for every architecture that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import Recorder, storages

from ..binding.adapters import Adapter, adapter_of
from ..binding.bind import Binding, bind
from ..distributed.wrappers import parameters_of, short_name, walk
from ..errors import PlanError, first_line
from .accounts import Accounts
from .fake_model import FakeModel, MaskAnswers, ordinary_positions
from .inputs import Inputs
from .live_bytes import LiveBytes
from .retained import RetainedTable

if TYPE_CHECKING:
    from ..loss import Loss


@dataclass(frozen=True)
class Trace:
    """The memory of one step, in bytes.

    Args:
        table: what is retained between forward and backward.
        peak: the largest total size of the step's own tensors at one time, including gradients.
        parameters: parameters and buffers, and the scales of quantised weights.
        inputs: the batch.
        gradients: the trainable parameters, which is the size of all gradients at the end of backward.
    """

    table: RetainedTable
    peak: int
    parameters: int
    inputs: int
    gradients: int

    @property
    def retained(self) -> int:
        """Bytes retained between forward and backward."""
        return sum(storage.bytes for storage in self.table.storages if storage.holders)

    def whole(self, optimizer_states: int) -> int:
        """Return the bytes at the peak, with the batch, the model and this many optimizer states per number."""
        return self.parameters + self.inputs + optimizer_states * self.gradients + self.peak


def trace(
    model: nn.Module,
    inputs: Inputs,
    *,
    frozen: Collection[str] = (),
    recompute: Collection[str] = (),
    fast: bool = True,
    keep_dropout: bool = False,
    device: str = "",
    loss: Loss | None = None,
    backward: bool = True,
) -> Trace:
    """Trace a step of a copy of a model, on the fast path or as stock PEFT. The model itself does not change.

    The model is a PEFT model on any device, bound or not, or the module of a `FakeModel`. The other arguments are those
    of `plan_memory`, with exact names of adapters and blocks, and with a kind of device. In stock PEFT the dropout of
    frozen adapters always stays on. Without backward, the peak is that of forward.

    Raises:
        PlanError: The model does not run without values.
        BindingError: The model has no layer that can be bound.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from safe_peft.planning.inputs import InputSpec
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0", "1"]))
        >>> trace(model, Inputs({"input": InputSpec((4, 8), "float32")})).retained  # the input of the second layer
        128
    """
    fake = FakeModel(model, device)
    if not fake.module.training:
        fake.module.train()
    adapters = live_adapters(fake.module)
    if fast:
        bind(fake.module).recompute.update(recompute)
    for adapter in adapters:
        if adapter.name in frozen:
            adapter.freeze(keep_dropout=keep_dropout or not fast)
    live = [adapter for adapter in adapters if adapter.name not in frozen]
    try:
        return _run(fake, Accounts(fake.module, live, recompute if fast else ()), inputs, device, loss, backward)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"{type(model).__name__} does not run without values ({type(error).__name__}: {first_line(error)}); a plan "
            "needs a model that does not read the values of its inputs, and a batch that fits the model."
        ) from error


def live_adapters(model: nn.Module) -> list[Adapter]:
    """Return the adapters of a PEFT model that train, bound or not."""
    layers = {short_name(name): layer for name, layer in walk(model) if adapter_of(layer) is not None}
    return Binding(layers).live_adapters()


def _run(fake: FakeModel, accounts: Accounts, inputs: Inputs, kind: str, loss_of: Loss | None, backward: bool) -> Trace:
    """Run one forward and backward on a fake model, with records of every saved tensor."""
    device, dtype = parameters_of(fake.module)[0].device, inputs.autocast
    with (
        fake.mode,
        MaskAnswers({call.rows for call in inputs.calls}, inputs.padded),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        nullcontext() if "position_ids" in inputs.tensors else ordinary_positions(),
        torch.autocast(device.type, dtype=getattr(torch, dtype)) if dtype else nullcontext(),
        AsOnGpu() if kind == "cuda" and device.type == "cpu" else nullcontext(),
    ):
        arguments = [call.make(device) for call in inputs.calls]
        batch = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        called = [fake.module.get_submodule(call.source) for call in inputs.calls]
        existing = fake.tensors
        with LiveBytes([*existing, *batch], accounts.note_draw, fake=True) as live:
            known = {key for t in [*existing, *batch] for key, _ in storages(t)}
            loss, table = _forward(accounts, partial(_loss, loss_of, called, arguments), known)
            if loss is not None and backward:
                torch.autograd.backward(loss)  # Tensor.backward may be patched by a program that watches losses
            peak = live.peak
    trained = sum(p.numel() * p.element_size() for p in parameters_of(fake.module) if p.requires_grad)
    return Trace(table, peak, _size(existing), _size(batch), trained)


def _forward(accounts: Accounts, compute: Callable[[], Any], known: set[int]) -> tuple[Tensor | None, RetainedTable]:
    recorder = Recorder(accounts.note)
    with accounts.watching(), saved_tensors_hooks(recorder.pack, recorder.unpack):
        loss = compute()
    if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
        got = f"one of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise PlanError(f"loss: expected a tensor of one element, got {got}; return the loss itself.")
    if loss is None or not loss.requires_grad:
        return None, accounts.table(Recorder(), [], known)
    return loss, accounts.table(recorder, [loss.grad_fn], known)


def _loss(loss: Loss | None, called: list[nn.Module], arguments: list[dict[str, Any]]) -> Any:
    """Return the loss of a step; for several calls, the sum of their losses."""
    if loss is not None:
        return loss(called[0], arguments[0])
    found = [_differentiated(module, batch) for module, batch in zip(called, arguments, strict=True)]
    losses = [one for one in found if one is not None and one.requires_grad]
    return sum(losses[1:], losses[0]) if losses else None


def _differentiated(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """Return only the tensor that training differentiates, so that the rest of the output is deleted as in training."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return leaves[0].float().sum() if leaves else None


def _size(tensors: Iterable[Tensor]) -> int:
    return sum({key: size for tensor in tensors for key, size in storages(tensor)}.values())


# ---------------------------------------------------------------- training on a GPU, planned without one


def device_kind(device: str | torch.device | None) -> str:
    """Return the kind of device that a plan is for, "cpu" or "cuda"; "" for the model's own device."""
    if device is None:
        return ""
    kind = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise PlanError(f"device: expected cpu or cuda, where the model will train, got {device!r}.")
    return kind


class AsOnGpu(TorchFunctionMode):
    """Makes PyTorch's ops on a CPU retain what the CUDA kernels retain.

    - `dropout` retains a mask of one byte per element on a GPU, and a mask of the input's dtype on a CPU.
    - `scaled_dot_product_attention` with dropout retains two seeds on a GPU, and on a CPU all probabilities and a mask.

    Example:
        >>> with AsOnGpu():
        ...     F.dropout(torch.ones(2, requires_grad=True), 0.5).grad_fn.name()
        'NativeDropoutBackward0'
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or its replacement for a GPU."""
        return _ON_GPU.get(func, func)(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace or not training or not 0.0 < p < 1.0:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **others: Any
) -> Tensor:
    """Compute attention without dropout, and draw one number, so that the block counts as random."""
    if dropout_p:
        torch.rand(1, device=query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **others)


_ON_GPU = {F.dropout: _dropout, F.scaled_dot_product_attention: _attention}
