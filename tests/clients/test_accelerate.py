"""accelerate: a loop of one's own whose gradients accumulate, and going on from `save_state`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from side_by_side import Compared, side_by_side
from tiny_texts import llama, lora
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from safe_peft import AdapterFreezer

STEPS = 12


def names(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = get_peft_model(llama(LlamaForCausalLM), lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 300, (9,), generator=draw) for _ in range(4 * STEPS)]
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    return {"model": model, "optimizer": optimizer, "loader": loader, "accelerator": accelerator, "steps": STEPS}


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]) -> None:
    line, done = side_by_side("accelerate", "accelerate", names, tmp_path, monkeypatch)
    table.append(line)
    assert done["ours"].names["freezer"].state_dict()["step"] == STEPS


def test_it_goes_on_from_save_state_to_the_same_bits(tmp_path: Path) -> None:
    """`load_state` loads the optimizer before what is registered, and torch takes that too."""

    def prepared() -> tuple[Any, Any, Any, Accelerator, AdapterFreezer]:
        made = names(tmp_path)
        accelerator = made["accelerator"]
        model, optimizer, loader = accelerator.prepare(made["model"], made["optimizer"], made["loader"])
        freezer = AdapterFreezer(model, optimizer, {"target_fraction": 0.75}, total_steps=STEPS)
        accelerator.register_for_checkpointing(freezer)
        return model, optimizer, loader, accelerator, freezer

    def train(model: Any, optimizer: Any, loader: Any, accelerator: Accelerator, freezer: AdapterFreezer) -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and freezer.step() and not (tmp_path / "saved").exists():
                accelerator.save_state(str(tmp_path / "saved"))

    whole = prepared()
    train(*whole)
    model, optimizer, loader, accelerator, freezer = prepared()
    accelerator.load_state(str(tmp_path / "saved"))
    done = freezer.state_dict()["step"]
    assert 0 < done < STEPS and freezer.frozen
    train(model, optimizer, accelerator.skip_first_batches(loader, 2 * done), accelerator, freezer)
    assert freezer.ledger == whole[-1].ledger
    expected = dict(whole[0].named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
