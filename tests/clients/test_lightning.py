"""Lightning: the recipe, going on from a checkpoint, gradients that accumulate, and a training that is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import PeftModel, get_peft_model
from pytorch_lightning.callbacks import ModelCheckpoint
from side_by_side import Compared, side_by_side
from tiny_texts import llama, lora
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from safe_peft import BindingError, SafeConfig
from safe_peft.lightning import SafeLightningCallback

STEPS = 12
OPTIONS = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Module(pl.LightningModule):
    """As users write them: the PEFT model is an attribute."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: PeftModel = get_peft_model(llama(LlamaForCausalLM), lora(**options))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    return DataLoader([torch.randint(3, 300, (2, 9), generator=generator) for _ in range(STEPS)], batch_size=None)


def names(folder: Path) -> dict[str, Any]:
    module = Module()
    return {"module": module, "model": module.model, "loader": loader(), "options": OPTIONS}


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]) -> None:
    line, _ = side_by_side("Lightning", "lightning", names, tmp_path, monkeypatch)
    table.append(line)


def test_bytes_are_planned_behind_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]
) -> None:
    def by_bytes(folder: Path) -> dict[str, Any]:
        return {**names(folder), "config": SafeConfig(freeze_by="bytes", target_fraction=0.6)}

    line, _ = side_by_side("Lightning, by bytes", "lightning", by_bytes, tmp_path, monkeypatch)
    table.append(line)


def fit(module: Module, folder: Path, epochs: int, **options: Any) -> SafeLightningCallback:
    callback = SafeLightningCallback({"target_fraction": 0.75, "freeze_by": "adapters"})
    every_epoch = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    checkpoint = options.pop("ckpt_path", None)
    trainer = pl.Trainer(**OPTIONS, max_epochs=epochs, callbacks=[callback, every_epoch], **options)
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return callback


def test_it_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    """At the end of an epoch, that is: in the middle of one Lightning begins the data again."""
    whole, resumed = Module(), Module()
    expected = fit(whole, tmp_path / "whole", 2)
    found = fit(resumed, tmp_path / "resumed", 2, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert expected.freezer.ledger.freezings[0].step < STEPS < expected.freezer.ledger.freezings[-1].step
    assert found.freezer.ledger == expected.freezer.ledger
    for name, weight in whole.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name


def test_gradients_that_accumulate_are_one_step(tmp_path: Path) -> None:
    callback = fit(Module(), tmp_path, 1, accumulate_grad_batches=3)
    assert callback.freezer.state_dict()["step"] == 4


def test_an_exception_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Dies(Module):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if index == 9:
                raise RuntimeError("out of memory, say")
            return super().training_step(batch, index)

    module = Dies()
    before = list(module.weights())
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, tmp_path, 1)
    assert list(module.weights()) == before


def test_before_training_there_is_no_freezer() -> None:
    with pytest.raises(BindingError, match="there is no freezer yet"):
        _ = SafeLightningCallback().freezer
