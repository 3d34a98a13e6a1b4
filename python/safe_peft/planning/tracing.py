"""Runs one training step on a copy of a model without values: what autograd holds, and how high memory goes.

Nothing is estimated by formulas: the model's own code, PEFT's and this package's make every decision as they do in
training, and every tensor that is saved is seen. So whatever architecture runs, its plan is right.
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
    """What one step does to memory, in bytes.

    Args:
        table: what is retained between forward and backward.
        peak: the most that tensors made in the step occupy at a time, gradients included.
        parameters: parameters and buffers, and the scales of quantised weights.
        inputs: the batch.
        gradients: what trains, and so the gradients at the end of backward.
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
        """Bytes at the peak of a step: what lies there from step to step, and what the step makes.

        Args:
            optimizer_states: numbers the optimizer keeps for one that trains.
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
    """Trace a step of a model that is neither run nor changed.

    Args:
        model: a PEFT model, bound or not, on any device, or the module of a `FakeModel`.
        inputs: the batch.
        frozen: names of adapters to freeze.
        recompute: names of blocks that run again in backward once they are frozen.
        fast: bind the copy; otherwise it is stock PEFT.
        keep_dropout: leave the dropout of frozen adapters on; stock PEFT always does.
        device: the kind of device the model will train on, "cpu" or "cuda"; "" for the one it is on.
        loss: computes the loss of the model and a batch; None: the model's own.

    Raises:
        PlanError: The model does not run without values.
        BindingError: It has nothing to bind.

    Example:
        >>> trace(model, inputs_for(model, 8, 128)).retained  # doctest: +SKIP
        23068672
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
            "needs a model whose shapes do not depend on its data, and a batch that fits it."
        ) from error


def live_adapters(model: nn.Module) -> list[Adapter]:
    """Return the adapters of a model that train, bound or not.

    Args:
        model: a PEFT model.
    """
    layers = {short_name(name): layer for name, layer in walk(model) if adapter_of(layer) is not None}
    return Binding(layers).live_adapters()


class _Step:
    """One forward and backward, watched."""

    def __init__(self, fake: FakeModel, adapters: list[Adapter], recompute: Collection[str]) -> None:
        self.fake, self.accounts = fake, Accounts(fake.module, adapters, recompute)

    def run(self, inputs: Inputs, kind: str, loss_of: Loss | None) -> Trace:
        """Forward, account, backward."""
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
                    loss.backward()
                peak = live.peak
        trained = sum(p.numel() * p.element_size() for p in parameters_of(module) if p.requires_grad)
        return Trace(table, peak, _size(existing), _size(batch), trained)

    def _forward(self, compute: Callable[[], Any], known: set[int]) -> tuple[Tensor | None, RetainedTable]:
        recorder = Recorder(self.accounts.note)
        with self.accounts.watching(), saved_tensors_hooks(recorder.pack, recorder.unpack):
            loss = compute()
        if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            got = f"one of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PlanError(f"loss: expected a tensor of one element, got {got}; return what backward is called on.")
        if loss is None or not loss.requires_grad:
            return None, self.accounts.table(Recorder(), [], known)
        return loss, self.accounts.table(recorder, [loss.grad_fn], known)


def _autocast(device: torch.device, inputs: Inputs) -> AbstractContextManager[Any]:
    if not inputs.autocast:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, inputs.autocast))


def _loss(loss: Loss | None, called: list[nn.Module], arguments: list[dict[str, Any]]) -> Any:
    """The loss of a step, or, of one that calls several models, the sum of what each would differentiate."""
    if loss is not None:
        return loss(called[0], arguments[0])
    found = [_differentiated(module, batch) for module, batch in zip(called, arguments, strict=True)]
    losses = [one for one in found if one is not None and one.requires_grad]
    return sum(losses[1:], losses[0]) if losses else None


def _differentiated(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """What a training differentiates, and nothing else, so that the rest of the output is gone as it is there."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return leaves[0].float().sum() if leaves else None


def _size(tensors: Iterable[Tensor]) -> int:
    return sum({key: size for tensor in tensors for key, size in storages(tensor)}.values())
