"""timm: a vision transformer whose blocks stand in an nn.Sequential."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import get_peft_model
from side_by_side import Compared, side_by_side
from tiny_texts import lora


def names(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes).train()
    draw = torch.Generator().manual_seed(2)
    loader = [(torch.randn(2, 3, 32, 32, generator=draw), torch.randint(0, 4, (2,), generator=draw)) for _ in range(12)]
    targets = r".*blocks.*\.(qkv|proj|fc1|fc2)"
    config = lora(target_modules=targets, modules_to_save=["head"])
    return {"vit": vit, "loader": loader, "lora": config, "get_peft_model": get_peft_model}


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]) -> None:
    line, _ = side_by_side("timm ViT", "timm", names, tmp_path, monkeypatch)
    table.append(line)
