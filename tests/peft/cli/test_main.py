"""The command line: what a user can fix is one sentence and exit status 2, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import call
from texts import bert_folder, sentences, write_jsonl
from typer.testing import CliRunner

from safe_peft import FreezeReport, SafeError
from safe_peft.cli.finetune import configure
from safe_peft.cli.main import app
from safe_peft.report.records import AdapterRecord, Scoring


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    bert_folder(folder / "bert")
    write_jsonl(folder / "train.jsonl", sentences(48))
    write_jsonl(folder / "eval.jsonl", sentences(16, seed=1))
    (folder / "short.csv").write_text("text,label\na,1\n")
    return folder


def finetune(files: Path, folder: Path, *more: object, **changes: object) -> tuple[int, str, str]:
    given = {
        "model": files / "bert",
        "train": files / "train.jsonl",
        "eval": files / "eval.jsonl",
        "output": folder,
    } | changes
    options = [item for name, value in given.items() for item in (f"--{name.replace('_', '-')}", value)]
    return call("finetune", *options, "--max-length", 16, "--max-steps", 6, *more)


def test_finetune_trains_and_says_what_it_gave(files: Path, tmp_path: Path) -> None:
    status, out, err = finetune(
        files, tmp_path / "out", "--r", 4, "--target-fraction", 0.5, "--never-freeze", "*.pooler.*"
    )
    assert status == 0, err
    assert "accuracy" in out
    assert re.search(r"\d+ of 13 adapters frozen; 0.\d MiB retained per step at the end", out)
    assert "train (safe)  6/6" in err
    report = FreezeReport.load(tmp_path / "out" / "report.json")
    assert report.config["never_freeze"] == ["*.pooler.*"]
    assert not any("pooler" in freezing.name for freezing in report.freezings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": "gone.csv"}, "gone.csv does not exist"),
        ({"text_column": "sentence"}, "no column 'sentence'; its columns are text, label"),
        ({"train": "{files}/short.csv", "eval": "{files}/short.csv"}, "one class only, '1'"),
        ({"model": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),
        ({"task": "chat"}, "task must be one of seq-cls, causal-lm, got 'chat'"),
        ({"warmup": "soon"}, "warmup must be optimizer steps (100) or a share of the training (0.2), got 'soon'"),
        ({"lora_dropout": "nan"}, "lora_dropout must lie in [0, 1], got nan"),
        ({"score": "luck"}, "score: expected one of"),
        ({"policy": "luck"}, "policy: expected one of"),
        ({"policy": "prefix", "freeze_by": "adapters"}, "policy: 'prefix' needs freeze_by"),
        ({"threshold": 0.1, "target_fraction": 0.5}, "target_fraction and threshold: expected only one of them"),
        ({"target_modules": "nothing,there"}, "LoRA options: "),
        ({"output": "{files}/short.csv"}, "cannot be written to"),
        ({"bottleneck": 8, "r": 4}, "--bottleneck and --r: r is for LoRA; expected one of them, got both"),
        ({"bottleneck": -1}, "bottleneck options: reduction_factor: expected a number above 0, got -1.0"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(files: Path, tmp_path: Path, changes: dict[str, str], says: str) -> None:
    changes = {name: value.format(files=files) if isinstance(value, str) else value for name, value in changes.items()}
    status, out, err = finetune(files, tmp_path / "out", **changes)
    assert status == 2
    assert says in err
    assert err.startswith("safe-peft: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--debug", "report", str(tmp_path)])
    assert isinstance(result.exception, SafeError)


def test_options_go_where_they_belong() -> None:
    given = {
        "train": "t.csv",
        "eval": "e.csv",
        "model": "my-folder",
        "r": 4,
        "target_modules": "query, value",
        "use_rslora": True,
        "warmup": "100",
        "freeze_end": "0.5",
        "threshold": None,
        "seed": 3,
        "no_freeze": False,
    }
    config = configure(given)
    assert config.lora == {"r": 4, "target_modules": ["query", "value"], "use_rslora": True}
    assert config.safe == {"warmup": 100, "freeze_end": 0.5, "seed": 3}
    assert (config.method, config.seed) == ("safe", 3)
    assert configure(given | {"method": "stock"}).method == "stock"
    factor = {"bottleneck": 4.0, "lora_dropout": 0.1, "r": 8, "target_modules": "all-linear", "use_rslora": False}
    assert configure(given | factor).bottleneck == {"reduction_factor": 4.0, "dropout": 0.1}
    with pytest.warns(FutureWarning, match="--target is --freeze-by now"):
        assert configure(given | {"target": "adapters"}).safe["freeze_by"] == "adapters"
    with pytest.warns(FutureWarning, match="--no-freeze is --method bind now"):
        assert configure(given | {"no_freeze": True}).method == "bind"


def test_report_shows_the_tables_and_draws_again(tmp_path: Path) -> None:
    report = FreezeReport(
        "tiny", {"score": "cka"}, 4, (AdapterRecord("layer.0.query", 8),), (Scoring(2, None, {"layer.0.query": 0.25}),)
    )
    report.save_json(tmp_path / "report.json")
    status, out, _ = call("report", tmp_path)
    assert status == 0
    assert "2.50e-01" in out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.png", "report.html"}


def test_report_refuses_a_damaged_file_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"format": "safe_peft.report", "version": 1}')
    status, _, err = call("report", tmp_path)
    assert status == 2
    assert "report lacks adapters, config, model, total_steps" in err
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_without_a_report_is_named(tmp_path: Path) -> None:
    status, _, err = call("report", tmp_path / "nowhere")
    assert (status, "report.json does not exist" in err) == (2, True)
    (tmp_path / "train.csv").write_text("text,label")
    status, _, err = call("report", tmp_path / "train.csv")
    assert (status, "train.csv is not JSON" in err) == (2, True)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES])
def test_a_picture_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    FreezeReport("m", {}, 1, ()).save_json(tmp_path / "report.json")

    def fail(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason), "report.png")

    monkeypatch.setattr(FreezeReport, "save_png", fail)
    assert call("report", tmp_path)[::2] == (2, f"safe-peft: report.png: {os.strerror(reason)}.\n")


def test_an_interruption_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FreezeReport, "load", interrupt)
    assert call("report", tmp_path)[::2] == (130, "safe-peft: interrupted; no incomplete files were kept.\n")


@pytest.mark.parametrize("command", ["finetune", "plan", "report", "doctor"])
def test_every_command_explains_itself(command: str) -> None:
    status, out, _ = call(command, "--help")
    assert status == 0
    assert "Usage" in out


def test_help_and_errors_of_options_need_no_torch() -> None:
    code = (
        "import sys, safe_peft.cli.main as cli\nfrom typer.testing import CliRunner\n"
        "r = CliRunner().invoke(cli.app, ['finetune', '--help'])\n"
        "sys.exit(r.exit_code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_doctor_passes_its_exit_status_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (0, 1):
        monkeypatch.setattr("safe_peft.cli.doctor.main", lambda status=status: status)
        assert call("doctor")[0] == status
