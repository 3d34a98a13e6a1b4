"""Runs one training step on a copy of a model without values, and records retained bytes and peak memory.

No formula estimates anything. The code of the model, of PEFT and of this package runs as in training, and every saved
tensor is recorded. So the plan is right for every architecture that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import Recorder, storages

from ..binding.adapters import Adapter, adapter_of
from ..binding.bind import Binding, bind
from ..distributed.wrappers import parameters_of, short_name, walk
from ..errors import PlanError, first_line
from .accounts import Accounts
from .device import as_on
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
        """Return the bytes at the peak of a step: permanent tensors and the step's own tensors.

        Args:
            optimizer_states: numbers that the optimizer keeps per trainable number.
        """
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
) -> Trace:
    """Trace a step of a model. The model itself does not run and does not change.

    Args:
        model: a PEFT model, bound or not, on any device, or the module of a `FakeModel`.
        inputs: the batch.
        frozen: names of adapters to freeze.
        recompute: names of blocks to recompute in backward once they are frozen.
        fast: whether to bind the copy; False traces stock PEFT.
        keep_dropout: whether the dropout of frozen adapters stays on; in stock PEFT it always does.
        device: the kind of device that the model will train on, "cpu" or "cuda"; "" for its current device.
        loss: computes the loss of the model and a batch; None: the model's own loss.

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
    step = _Step(fake, [adapter for adapter in adapters if adapter.name not in frozen], recompute if fast else ())
    try:
        return step.run(inputs, device, loss)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"{type(model).__name__} does not run without values ({type(error).__name__}: {first_line(error)}); a plan "
            "needs a model that does not read the values of its inputs, and a batch that fits the model."
        ) from error


def live_adapters(model: nn.Module) -> list[Adapter]:
    """Return the adapters of a model that train, bound or not.

    Args:
        model: a PEFT model.
    """
    layers = {short_name(name): layer for name, layer in walk(model) if adapter_of(layer) is not None}
    return Binding(layers).live_adapters()


class _Step:
    """One forward and backward, with records of every saved tensor."""

    def __init__(self, fake: FakeModel, adapters: list[Adapter], recompute: Collection[str]) -> None:
        self.fake, self.accounts = fake, Accounts(fake.module, adapters, recompute)

    def run(self, inputs: Inputs, kind: str, loss_of: Loss | None) -> Trace:
        """Run forward and backward, and return the trace."""
        module = self.fake.module
        device = parameters_of(module)[0].device
        positions = nullcontext() if "position_ids" in inputs.tensors else ordinary_positions()
        random = torch.random.fork_rng(devices=[])
        answers = MaskAnswers({call.rows for call in inputs.calls}, inputs.padded)
        with (
            self.fake.mode,
            answers,
            torch.enable_grad(),
            random,
            positions,
            _autocast(device, inputs),
            as_on(kind, device),
        ):
            arguments = [call.make(device) for call in inputs.calls]
            batch = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
            called = [module.get_submodule(call.source) for call in inputs.calls]
            existing = self.fake.tensors
            with LiveBytes([*existing, *batch], self.accounts.note_draw, fake=True) as live:
                known = {key for t in [*existing, *batch] for key, _ in storages(t)}
                loss, table = self._forward(partial(_loss, loss_of, called, arguments), known)
                if loss is not None:
                    torch.autograd.backward(loss)  # Tensor.backward may be patched by a program that watches losses
                peak = live.peak
        trained = sum(p.numel() * p.element_size() for p in parameters_of(module) if p.requires_grad)
        return Trace(table, peak, _size(existing), _size(batch), trained)

    def _forward(self, compute: Callable[[], Any], known: set[int]) -> tuple[Tensor | None, RetainedTable]:
        recorder = Recorder(self.accounts.note)
        with self.accounts.watching(), saved_tensors_hooks(recorder.pack, recorder.unpack):
            loss = compute()
        if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            got = f"one of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PlanError(f"loss: expected a tensor of one element, got {got}; return the loss itself.")
        if loss is None or not loss.requires_grad:
            return None, self.accounts.table(Recorder(), [], known)
        return loss, self.accounts.table(recorder, [loss.grad_fn], known)


def _autocast(device: torch.device, inputs: Inputs) -> AbstractContextManager[Any]:
    if not inputs.autocast:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, inputs.autocast))


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
