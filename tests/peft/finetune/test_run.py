"""Fine-tuning from files: files are judged, runs repeat, checkpoints are PEFT's, outputs are never half-made."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import assets
import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForSequenceClassification, PeftModel
from rich.console import Console
from texts import bert_folder, gpt2_folder, sentences, write_jsonl
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from safe_peft import ConfigError, FreezeReport, SafeError, bind, explain
from safe_peft.files.staging import staged
from safe_peft.finetune import data, measure
from safe_peft.finetune.config import FinetuneConfig
from safe_peft.finetune.run import finetune

QUIET = Console(quiet=True)
OUTPUTS = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_config",
    "report.html",
    "report.json",
    "report.png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    bert_folder(folder / "bert")
    gpt2_folder(folder / "gpt2")
    write_jsonl(folder / "train.jsonl", sentences(96))
    write_jsonl(folder / "eval.jsonl", sentences(64, seed=1))
    return folder


@pytest.fixture
def config(folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(folder / "bert"),
        train=str(folder / "train.jsonl"),
        eval=str(folder / "eval.jsonl"),
        lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        max_steps=12,
        batch_size=8,
        max_length=16,
        learning_rate=5e-3,
    )


# Runs


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare tests that do not look at it the drawing of the report."""
    monkeypatch.setattr("safe_peft.finetune.run.save_report", lambda *_: None)


def tensors(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "adapter_model.safetensors")


def test_a_run_writes_an_ordinary_peft_checkpoint_and_a_report(config: FinetuneConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = finetune(replace(config, output=str(output)), QUIET)
    names = {path.name for path in output.iterdir()}
    assert names >= OUTPUTS
    assert not [name for name in names if name.startswith(".")]
    assert FreezeReport.load(output / "report.json") == report
    run = report.runs[0]
    assert (run.method, run.steps, run.adapters, run.frozen) == ("safe", 12, 13, 10)
    assert run.frozen == len(report.freezings)
    assert run.retained[0][0] == 0
    assert run.retained[-1][0] == 12
    assert run.retained[-1][1] < run.retained[0][1]
    assert 0 < run.flops_end <= run.flops_start
    assert run.peak_rss > 2**26

    base = AutoModelForSequenceClassification.from_pretrained(
        config.model, config=AutoConfig.from_pretrained(output / "base_config")
    )
    assert base.config.id2label == {0: "negative", 1: "positive"}
    model = PeftModel.from_pretrained(base, output).eval()
    with bind(model):  # what was saved is PEFT's, ready to be bound again
        assert {layer.path for layer in explain(model)} == {"safe_kernels::lora"}
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(["the film was good", "a very dull plot"], return_tensors="pt", padding=True)
    expected = model(**inputs).logits
    kinds: list[Any] = [AutoPeftModelForSequenceClassification]
    if Version(peft.__version__) >= Version("0.21"):  # before it transformers' own loader leaves the trained head out
        kinds.append(AutoModelForSequenceClassification)
    for kind in kinds:
        torch.testing.assert_close(kind.from_pretrained(output).eval()(**inputs).logits, expected)


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("method", ["stock", "safe"])
def test_bottleneck_adapters_train_in_place_of_lora(config: FinetuneConfig, tmp_path: Path, method: str) -> None:
    adapters = {"reduction_factor": 8, "dropout": 0.1}
    run = finetune(replace(config, method=method, bottleneck=adapters, output=str(tmp_path)), QUIET).runs[0]
    assert run.adapters == 4 and (run.frozen > 0) == (method == "safe")
    assert any("bottleneck_down" in name for name in tensors(tmp_path))
    if method == "stock":
        assert run.flops_run == run.flops_start * run.steps
    else:
        assert run.flops_run > run.flops_end * run.steps


@pytest.mark.usefixtures("unreported")
def test_the_same_seed_gives_the_same_adapters(config: FinetuneConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)  # what happened before does not matter
        finetune(replace(config, output=str(tmp_path / name), seed=seed, max_steps=4), QUIET)
    first, again, other = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.usefixtures("unreported")
def test_stock_fast_path_and_safe_start_from_the_same_weights_and_batches(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    config = replace(
        config,
        lora=config.lora | {"lora_dropout": 0.0},
        max_steps=3,
        safe={"warmup": 3, "max_warmup": 3, "freeze_end": 3},
    )
    reports = {
        m: finetune(replace(config, method=m, output=str(tmp_path / m)), QUIET) for m in ("stock", "bind", "safe")
    }
    stock = tensors(tmp_path / "stock")
    for method in ("bind", "safe"):
        for key, value in tensors(tmp_path / method).items():
            torch.testing.assert_close(value, stock[key], rtol=1e-3, atol=1e-5)
    retained = {method: report.runs[0].retained[0][1] for method, report in reports.items()}
    assert retained["bind"] == retained["safe"] <= retained["stock"]
    assert reports["stock"].freezings == ()


@pytest.mark.usefixtures("unreported")
def test_measuring_leaves_training_alone(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finetune(replace(config, output=str(tmp_path / "measured")), QUIET)
    monkeypatch.setattr(measure, "retained_bytes", lambda *_: 1)
    monkeypatch.setattr(measure, "step_flops", lambda *_: 1)
    finetune(replace(config, output=str(tmp_path / "not")), QUIET)
    measured, not_measured = tensors(tmp_path / "measured"), tensors(tmp_path / "not")
    assert all(torch.equal(measured[key], not_measured[key]) for key in measured)


def perplexity(model: nn.Module, folder: Path, source: str) -> float:
    """Row by row, without padding."""
    tokenizer, total, count = AutoTokenizer.from_pretrained(source), 0.0, 0
    for text in data.read_texts(folder / "eval.jsonl", "text"):
        encoded = tokenizer(text, return_tensors="pt")
        ids, logits = encoded["input_ids"], model(**encoded).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.usefixtures("unreported")
@torch.no_grad()
def test_language_modelling_learns_and_reports_perplexity(config: FinetuneConfig, folder: Path, tmp_path: Path) -> None:
    source = str(folder / "gpt2")
    with torch.enable_grad():
        report = finetune(replace(config, model=source, task="causal-lm", output=str(tmp_path), max_steps=30), QUIET)
    run = report.runs[0]
    base = AutoModelForCausalLM.from_pretrained(source).eval()
    untrained = perplexity(base, folder, source)
    trained = perplexity(PeftModel.from_pretrained(base, tmp_path).eval(), folder, source)
    assert run.metric == "perplexity"
    assert run.value == pytest.approx(trained, rel=1e-4)
    assert run.value < 0.95 * untrained
    assert 0 < run.frozen == len(report.freezings) < run.adapters


def test_a_loss_in_chunks_trains_the_same(config: FinetuneConfig, folder: Path) -> None:
    config = replace(config, model=str(folder / "gpt2"), task="causal-lm", safe={"freeze_by": "adapters"})
    own, chunked = (finetune(replace(config, loss=loss), QUIET).runs[0] for loss in ("model", "chunked"))
    assert chunked.value == pytest.approx(own.value, rel=1e-4)
    assert chunked.frozen == own.frozen
    assert chunked.flops_start == pytest.approx(own.flops_start, rel=0.05)


def test_progress_is_told_in_lines_where_there_is_no_terminal(config: FinetuneConfig) -> None:
    stream = io.StringIO()
    finetune(replace(config, max_steps=5), Console(file=stream))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("train (safe)  1/5  loss ") and lines[0].endswith("frozen 0/13")
    assert lines[4].startswith("train (safe)  5/5  loss ")


@pytest.mark.slow
def test_minilm_learns_film_reviews(tmp_path: Path) -> None:
    train, test = assets.load_film_reviews()
    rows = [[{"text": text, "label": label} for text, label in part] for part in (train[:64], test[:32])]
    config = FinetuneConfig(
        model=str(assets.fetch("minilm")),
        train=write_jsonl(tmp_path / "train.jsonl", rows[0]),
        eval=write_jsonl(tmp_path / "eval.jsonl", rows[1]),
        output=str(tmp_path / "out"),
        lora={
            "target_modules": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        },
        max_steps=8,
        batch_size=8,
        max_length=24,
    )
    report = finetune(config, QUIET)
    run = report.runs[0]
    assert run.adapters == 36 and run.frozen >= 27
    assert run.retained[-1][1] < 0.3 * run.retained[0][1]
    assert {row.layer for row in report.rows()} == set(range(6))


# What goes wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "regression"}, "task must be one of seq-cls, causal-lm"),
        ({"loss": "focal"}, "loss must be one of model, chunked, got 'focal'"),
        ({"loss": "chunked"}, "loss: chunked needs task causal-lm, whose logits are large; got seq-cls"),
        ({"method": "magic"}, "method must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"safe": {"target_fraction": 2.0}}, "target_fraction"),
        ({"safe": {"speed": 2}}, "speed"),
        ({"lora": {"lora_dropout": 1.5}}, "lora_dropout must lie in [0, 1], got 1.5"),
        ({"lora": {"r": 0}}, "LoRA options"),
        ({"lora": {"rank": 8}}, "LoRA options"),
        ({"lora": {"target_modules": ["nothing"]}}, "LoRA options"),
        ({"max_length": 64}, "the model has 32 positions"),
        ({"model": "./nowhere"}, "there is no folder ./nowhere"),
        ({"model": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),
        ({"device": "abacus"}, "device must be one of auto, cpu, cuda, got 'abacus'"),
    ],
)
def test_an_option_that_cannot_work_is_named(config: FinetuneConfig, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune(replace(config, **change), QUIET)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_leaves_no_output_and_keeps_the_old_one(config: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        finetune(replace(config, output=str(tmp_path / "deep" / "new"), lora={"r": 0}), QUIET)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(SafeError, match="the loss is"):
        finetune(replace(config, output=str(tmp_path), learning_rate=1e30, max_grad_norm=1e30), QUIET)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "old")]


def test_other_files_of_an_output_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with staged(tmp_path) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "new.txt").write_text("new")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "notes.txt",
        "sub",
        "sub/new.txt",
    ]


def test_an_output_that_is_a_file_is_refused(config: FinetuneConfig, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"output: .*taken cannot be written to"):
        finetune(replace(config, output=str(tmp_path / "taken")), QUIET)
