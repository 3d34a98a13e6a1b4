"""Activation checkpointing and offloading around bound models that freeze: the same losses, scores and gradients."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EARLY, adamw, batches, bert, train
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from toy import Toy, freezer_of, gradients, pairs, toy

from safe_kernels.retention import measure
from safe_peft import AdapterFreezer, SafeConfig, bind


@pytest.mark.parametrize("hook", [False, True], ids=["no-hook", "hook"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_freezing_in_a_checkpointed_model_goes_as_without(reentrant: bool, hook: bool) -> None:
    """Scores too: what a recomputation adds to them a second time changes no ratio."""
    results = []
    for checkpointed in (False, True):
        model = bert(lora_dropout=0.1)
        if checkpointed:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if hook:
                model.enable_input_require_grads()
        optimizer = adamw(model)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = train(model, optimizer, batches(16), freezer)
        results.append((losses, freezer.ledger))
    (expected, ledger), (losses, own) = results
    assert losses == pytest.approx(expected, rel=1e-5)
    assert own.frozen == ledger.frozen
    assert len(own.frozen) == 9
    for ours, theirs in zip(own.scorings, ledger.scorings, strict=True):
        assert ours.importance == pytest.approx(theirs.importance, rel=1e-3, abs=1e-9)


def by_hand(**options: Any) -> Callable[..., Tensor]:
    return partial(checkpoint, **options)


def save_products_and_adapters(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = (torch.ops.aten.addmm.default, torch.ops.safe_kernels.lora.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def save_activations(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = (torch.ops.safe_kernels.activation.default, torch.ops.safe_kernels.layer_norm.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


WAYS = {
    "non-reentrant": by_hand(use_reentrant=False),
    "reentrant": by_hand(use_reentrant=True),
    "selective, adapters saved": by_hand(
        use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_products_and_adapters)
    ),
    "selective, activations saved": by_hand(
        use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_activations)
    ),
}


@pytest.mark.parametrize("frozen", [(), (0, 1), (2, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_by_hand_draw_the_same_dropout(way: str, frozen: tuple[int, ...]) -> None:
    results = []
    for checkpointed in (False, True):
        model, batch = toy(3, lora_dropout=0.5), next(pairs(1))
        inner: Toy = model.base_model.model
        batch["x"].requires_grad_()  # reentrant checkpoints want an input that does
        with bind(model) as binding:
            adapters = binding.live_adapters()
            for index in frozen:
                adapters[index].freeze(keep_dropout=True)
            if checkpointed:
                inner.around = WAYS[way]
            torch.manual_seed(3)
            loss = model(**batch)
            loss.backward()
        results.append((loss.detach(), batch["x"].grad, gradients(model)))
    (expected, x_grad, grads), (loss, own_x_grad, own_grads) = results
    assert torch.equal(loss, expected)
    assert torch.equal(own_x_grad, x_grad)
    assert own_grads.keys() == grads.keys()
    assert all(torch.equal(own_grads[name], grad) for name, grad in grads.items())


def test_reentrant_checkpoints_over_an_input_without_grad_are_warned_of_as_in_stock_peft() -> None:
    """Called by hand they hide the block's call from the binding; of those that transformers calls it fixes this."""
    for bound in (False, True):
        model, batch = toy(), next(pairs(1))
        model.base_model.model.around = by_hand(use_reentrant=True)
        if bound:
            bind(model)
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            model(**batch).backward()
        assert not any("blocks" in name for name in gradients(model))


# ---------------------------------------------------------------- offloading


class File:
    """What a node holds; a norm lets go of its input once a layer that trains keeps its output."""

    def __init__(self, path: Path, storage: torch.UntypedStorage) -> None:
        self.path, self.key, self.bytes = path, storage.data_ptr(), storage.nbytes()


class Disk:
    """Hooks that write what is retained to files; `bytes` is what nodes still hold of it, each storage once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[weakref.ref[File]] = []
        self.known: dict[int, Tensor] = {}
        self.parameters: set[int] = set()

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameters or tensor.dim() == 0:
            return tensor
        self.known.setdefault(storage.data_ptr(), tensor)  # kept, so that no other takes its address
        file = File(self.folder / f"{len(self.files)}.npy", storage)
        self.files.append(weakref.ref(file))
        np.save(file.path, tensor.detach().numpy())
        return file

    @property
    def bytes(self) -> int:
        return sum({file.key: file.bytes for ref in self.files if (file := ref()) is not None}.values())

    def unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.from_numpy(np.load(packed.path))


@pytest.mark.parametrize("frozen", [(), (0, 1), (2, 3)], ids=str)
def test_what_hooks_offload_is_what_the_contract_says(tmp_path: Path, frozen: tuple[int, ...]) -> None:
    model, batch = toy(3, lora_dropout=0.5), next(pairs(1))
    with bind(model) as binding:
        adapters = binding.live_adapters()
        for index in frozen:
            adapters[index].freeze()
        expected = measure(lambda: model(**batch), exclude=[model, *batch.values()])
        disk = Disk(tmp_path)
        ours = (*model.parameters(), *batch.values())
        disk.parameters = {tensor.untyped_storage().data_ptr() for tensor in ours}
        torch.manual_seed(3)
        with saved_tensors_hooks(disk.pack, disk.unpack):
            loss = model(**batch)
        scalars = sum(t.bytes for t in expected.tensors if t.shape == ())
        assert disk.bytes == expected.bytes - scalars
        loss.backward()
        grads = gradients(model)
        torch.manual_seed(3)
        model(**batch).backward()
    for name, grad in gradients(model).items():
        assert torch.equal(grads[name], grad), name


def test_a_whole_training_saved_on_the_cpu(tmp_path: Path) -> None:
    losses = []
    for offloaded in (False, True):
        model = toy(3, lora_dropout=0.1)
        optimizer = adamw(model)
        freezer = freezer_of(model, optimizer, recompute="frozen")
        torch.manual_seed(3)
        seen = []
        for batch in pairs(18):
            loss = _loss(model, batch, offloaded)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
            seen.append(loss.item())
        assert len(freezer.frozen) == 5
        losses.append(seen)
    assert losses[0] == losses[1]


def _loss(model: nn.Module, batch: dict[str, Tensor], offloaded: bool) -> Tensor:
    if not offloaded:
        return model(**batch)
    with save_on_cpu():
        return model(**batch)
