"""The demo: the trainings of one seed differ in the method alone, and the report holds all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import assets
import demo
import pytest
import typer
from texts import bert_folder, sentences

from safe_peft import ConfigError, FreezeReport
from safe_peft.cli.main import app
from safe_peft.report.records import RunRecord
from safe_peft.report.tables import verdict

METHODS = "stock,safe,count,random"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FreezeReport]:
    """Run the demo on a tiny model, with made-up reviews in place of the real ones."""
    rows = [assets.Example(row["text"], int(row["label"] == "positive")) for row in sentences(320)]
    monkeypatch.setattr(demo, "load_film_reviews", lambda: (rows[:256], rows[256:]))
    model = bert_folder(tmp_path / "bert")

    def run(**changes: Any) -> FreezeReport:
        options = {"output": str(tmp_path / "out"), "model": model, "rows": 80, "test_rows": 32, "batch_size": 8}
        demo.demo(**options | {"max_length": 16, "methods": METHODS} | changes)
        return FreezeReport.load(tmp_path / "out" / "report.json")

    return run


def test_trainings_differ_in_the_method_alone() -> None:
    stock, safe, count, control = (demo.command({"model": "m", "seed": 5}, name) for name in METHODS.split(","))
    assert safe[-4:] == ["--model", "m", "--seed", "5"]
    assert stock == [*safe, "--method", "stock"]
    assert count == [*safe, "--freeze-by", "adapters"]
    assert control == [*safe, "--policy", "random_sets"]


def one_process_is_enough(command: list[str], **options: Any) -> Any:
    """Trains in this process, but for stock PEFT: what another process imports takes longer than its training."""
    if "stock" in command:
        return subprocess.run(command, **options)
    assert command[:3] == [sys.executable, "-m", "safe_peft.cli.main"]
    with redirect_stdout(sys.stderr):
        app(command[3:], standalone_mode=False)
    return SimpleNamespace(returncode=0)


def test_the_report_holds_every_run_and_shows_the_first_safe_one(
    run: Callable[..., FreezeReport], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=one_process_is_enough))
    # A training's own pictures are of no use here.
    monkeypatch.setattr("safe_peft.finetune.run.save_report", lambda report, at: report.save_json(at / "report.json"))
    report = run()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.png",
        "memory.png",
        "report.html",
    }
    assert [(name, len(plan.frozen)) for name, plan in report.plans] == [("start", 0), ("end", report.runs[1].frozen)]
    assert [(run.method, run.seed) for run in report.runs] == [(method, 0) for method in METHODS.split(",")]
    stock, safe, count, control = report.runs
    assert (stock.frozen, count.frozen) == (0, 10) and safe.frozen > 0 < control.frozen
    assert safe.retained[-1][1] < count.retained[-1][1], "what freezing is to free, it frees"
    assert stock.retained_mean == stock.retained[0][1]
    assert safe.retained[-1][1] < safe.retained_mean < safe.retained[0][1]
    assert stock.flops_run == stock.flops_start * stock.steps
    assert safe.flops_end * safe.steps < safe.flops_run < count.flops_run
    assert safe.retained[-1][1] < safe.retained[0][1] < stock.retained[0][1] == stock.retained[-1][1]
    assert report.retained == safe.retained
    assert report.config["score"] == "cka"
    assert "SAFE by count froze 10 of 13 adapters. Compared with stock PEFT, a step" in verdict(report.runs)
    assert "SAFE by count froze 10 of 13 adapters." in " ".join(capfd.readouterr().out.split())


def test_several_seeds_repeat_every_method(run: Callable[..., FreezeReport], monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(options: dict[str, Any], method: str) -> FreezeReport:
        retained, seed = ((0, 5), (4, 4)), options["seed"]
        assert (options["bottleneck"], options["target-modules"]) == (8.0, "all-linear")
        run = RunRecord(method, seed, "accuracy", 0.5, 10, 4, 2, 1, 1.0, 9, retained, flops_start=1, flops_end=1)
        return FreezeReport(f"{method} {seed}", {}, 4, (), runs=(run,))

    monkeypatch.setattr(demo, "train", fake)
    report = run(seed=3, seeds=2, methods="stock, safe", bottleneck=8.0)
    assert [(run.method, run.seed) for run in report.runs] == [("stock", 3), ("safe", 3), ("stock", 4), ("safe", 4)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": "stock,magic"}, "methods must be some of stock, bind, safe, count, random, cached, each once"),
        ({"methods": "stock,stock"}, "each once"),
        ({"methods": ""}, "methods must be some of"),
        ({"lora_dropout": float("nan"), "methods": "safe"}, "the training with method safe failed."),
    ],
)
def test_a_run_that_fails_says_so_and_leaves_no_output(
    run: Callable[..., FreezeReport],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Any,
    says: str,
) -> None:
    with pytest.raises(typer.Exit) as caught:
        run(**change)
    assert (caught.value.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert says in capfd.readouterr().err


def test_names_of_methods_may_have_spaces() -> None:
    assert demo.checked("stock, safe") == ["stock", "safe"]
    with pytest.raises(ConfigError):
        demo.checked("stock safe")
