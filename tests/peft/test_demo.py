"""The demo: runs of one seed differ in the method alone, and what it writes holds all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from texts import bert_folder, sentences

from safe_peft import ConfigError, FreezeReport, SafeError
from safe_peft.cli import demo
from safe_peft.cli.demo import DemoConfig, run_config
from safe_peft.finetune import assets
from safe_peft.finetune.config import FinetuneConfig
from safe_peft.report.comparison import verdict
from safe_peft.report.records import RunRecord

QUIET = Console(quiet=True)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoConfig:
    """A tiny model and made-up reviews in place of the real ones."""
    rows = [assets.Example(row["text"], int(row["label"] == "positive")) for row in sentences(320)]
    monkeypatch.setattr(assets, "load_film_reviews", lambda: (rows[:256], rows[256:]))
    model = bert_folder(tmp_path / "bert")
    methods = ("stock", "safe", "bytes", "random")
    return DemoConfig(str(tmp_path / "out"), model, methods, rows=80, test_rows=32, batch_size=8, lora_dropout=0.1)


def in_this_process(config: FinetuneConfig) -> FreezeReport:
    from safe_peft.finetune.run import finetune

    return finetune(replace(config, max_length=16), QUIET)


def test_runs_of_one_seed_differ_in_the_method_alone(config: DemoConfig) -> None:
    stock, safe, by_bytes, control = (run_config(config, Path("data"), method, 5) for method in config.methods)
    assert replace(stock, method="safe") == safe
    assert replace(control, safe=safe.safe) == safe
    assert safe.safe | {"score": "random"} == control.safe
    assert [run.label for run in (stock, safe, by_bytes, control)] == ["stock", "safe", "bytes", "random"]


def test_the_report_holds_every_run_and_shows_the_first_safe_one(
    config: DemoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_isolated", in_this_process)
    report = demo.demo(config, QUIET)
    output = Path(config.output)
    assert {path.name for path in output.iterdir()} == {"report.json", "report.png", "memory.png", "report.html"}
    assert [(name, len(plan.frozen)) for name, plan in report.plans] == [("start", 0), ("end", 10)]
    assert FreezeReport.load(output / "report.json") == report
    assert [(run.method, run.seed) for run in report.runs] == [(method, 0) for method in config.methods]
    stock, safe, by_bytes, control = report.runs
    assert (stock.frozen, safe.frozen, control.frozen) == (0, 10, 10)
    assert by_bytes.retained[-1][1] < safe.retained[-1][1], "what freezing is to free, it frees"
    assert safe.retained[-1][1] < safe.retained[0][1] < stock.retained[0][1] == stock.retained[-1][1]
    assert report.retained == safe.retained
    assert report.config["score"] == "cka"
    assert "SAFE ended with 10 of 13 adapters frozen" in verdict(report.runs)


def test_several_seeds_repeat_every_method(config: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(config: FinetuneConfig) -> FreezeReport:
        retained = ((0, 5), (4, 4))
        run = RunRecord(
            config.label, config.seed, "accuracy", 0.5, 10, 4, 2, 1, 1.0, 9, retained, flops_start=1, flops_end=1
        )
        return FreezeReport(f"{config.label} {config.seed}", {}, 4, (), runs=(run,))

    monkeypatch.setattr(demo, "run_isolated", fake)
    report = demo.demo(replace(config, seed=3, seeds=2, methods=("stock", "safe")), QUIET)
    assert [(run.method, run.seed) for run in report.runs] == [("stock", 3), ("safe", 3), ("stock", 4), ("safe", 4)]
    assert report.model == "safe 3"


def test_a_run_that_fails_leaves_no_output(config: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: FinetuneConfig) -> FreezeReport:
        raise SafeError("the safe run was killed by the system")

    monkeypatch.setattr(demo, "run_isolated", fail)
    with pytest.raises(SafeError, match="killed"):
        demo.demo(config, QUIET)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ("stock", "magic")}, "methods must be some of"),
        ({"methods": ("stock", "stock")}, "each once"),
        ({"methods": ()}, "methods must be some of"),
        ({"rows": 0}, "rows must lie between 1 and 8,566"),
        ({"test_rows": 9999}, "test_rows must lie between"),
        ({"seeds": 0}, "seeds must lie between"),
        ({"lora_dropout": float("nan")}, r"lora_dropout must lie in \[0, 1\], got nan"),
    ],
)
def test_an_option_that_cannot_work_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DemoConfig("out", **change)  # type: ignore[arg-type]
