"""The README's and the docs' Python runs as it stands there, on tiny models; their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
from tiny import Rows, batches, bert, gpt2
from transformers import Trainer, TrainingArguments

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README's snippets take for granted."""
    import safe_peft

    monkeypatch.chdir(tmp_path)
    model = bert(layers=1)  # which compilers take half as long for
    layer = torch.nn.Linear(6, 5)
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=4, report_to=[], save_strategy="no", use_cpu=True)
    return {
        "torch": torch,
        "safe_peft": safe_peft,
        "Trainer": Trainer,
        "base_model": bert().unload(),
        "model": model,
        "batch": next(iter(batches(1))),
        "loader": list(batches(40)),
        "data": Rows(32),
        "causal_model": gpt2(),
        "tokens": {"input_ids": next(iter(batches(1)))["input_ids"]},
        "args": arguments,
        "train": lambda model: model(**next(iter(batches(1)))).loss.backward(),
        "layer": layer,
        "folder": assets.fetch("minilm"),
        "x": torch.randn(3, 6),
        "lora_A": torch.randn(2, 6),
        "lora_B": torch.randn(5, 2),
        "scaling": 2.0,
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "block", "exec"), names)
    if "freezer" in names:
        freezer = names["freezer"]
        assert len(freezer.frozen) >= 0.75 * len(freezer.adapters)
        assert (Path.cwd() / "report.html").stat().st_size > 1000


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
