"""The scripts in examples/ run as they stand there, on real weights and real text, for a few steps."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from releases import TRANSFORMERS_4

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, capsys: pytest.CaptureFixture[str], method: str = "LORA", **options: Any) -> str:
    """What a script prints; what it leaves is an ordinary PEFT checkpoint and a report."""
    runpy.run_path(str(EXAMPLES / name))["main"](output=folder, **options)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == method
    assert (folder / "adapter_model.safetensors").stat().st_size > 100_000
    assert (folder / "report.html").stat().st_size > 10_000
    return capsys.readouterr().out


def test_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run("classification.py", tmp_path, capsys, steps=10, test_rows=16)
    frozen = 28 if TRANSFORMERS_4 else 29  # BERT's attention in transformers 4 retains more
    assert f"{frozen} adapters frozen" in said and "accuracy 0." in said


def test_bottleneck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run("bottleneck_adapters.py", tmp_path, capsys, "BOTTLENECK", steps=10, test_rows=16)
    assert "12 adapter layers: 12 by safe_kernels::bottleneck" in said
    assert "of 12 adapters frozen" in said and "accuracy 0." in said
    assert "loaded again: accuracy 0." in said


def test_causal_lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run("causal_lm.py", tmp_path, capsys, steps=10, rows=1, length=32)
    lines = [line for line in said.splitlines() if line.startswith("step")]
    sizes = [int(line.split()[-2]) for line in lines]
    assert sizes[-1] <= 0.3 * sizes[0], "three quarters of the bytes are saved, and not at the cost of all adapters"
    assert " 210 of 210" not in lines[-1]
