"""diffusers: a UNet with LoRA on its attention, and on its convolutions too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from side_by_side import Compared, side_by_side
from tiny_texts import lora

ATTENTION, CONVOLUTIONS = ["to_q", "to_k", "to_v", "to_out.0"], ["conv1", "conv2", "conv_shortcut"]


def names(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).train()
    unet.requires_grad_(False)
    draw = torch.Generator().manual_seed(2)
    loader = [
        (
            torch.randn(2, 4, 8, 8, generator=draw),
            torch.randint(0, 1000, (2,), generator=draw),
            torch.randn(2, 5, 16, generator=draw),
            torch.randn(2, 4, 8, 8, generator=draw),
        )
        for _ in range(12)
    ]
    return {"unet": unet, "loader": loader, "lora": lora(target_modules=ATTENTION)}


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]) -> None:
    line, _ = side_by_side("diffusers UNet", "diffusers", names, tmp_path, monkeypatch)
    table.append(line)


def test_with_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]) -> None:
    def convolved(folder: Path) -> dict[str, Any]:
        return names(folder) | {"lora": lora(target_modules=[*ATTENTION, *CONVOLUTIONS])}

    line, _ = side_by_side("diffusers UNet, convolutions too", "diffusers", convolved, tmp_path, monkeypatch)
    table.append(line)


def test_with_gradient_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]) -> None:
    def checkpointed(folder: Path) -> dict[str, Any]:
        made = names(folder)
        made["unet"].enable_gradient_checkpointing()
        return made

    line, _ = side_by_side("diffusers UNet, checkpointed", "diffusers", checkpointed, tmp_path, monkeypatch)
    table.append(line)
