from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import call
from texts import bert_folder

from safe_peft import MemoryPlan


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without its weights: a plan must not read them."""
    folder = tmp_path_factory.mktemp("shell")
    bert_folder(folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


SIZE = ("--batch-size", 4, "--sequence-length", 16)


def test_a_plan_without_weights(shell: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "plan.json", "--picture", tmp_path / "plan.png")
    status, out, err = call("plan", "--model", shell, *SIZE, "--frozen-fraction", 0.5, "--groups", *files)
    assert status == 0, err
    plan = MemoryPlan.from_dict(json.loads((tmp_path / "plan.json").read_text()))
    assert str(plan) in out and plan.groups_table() in out
    assert plan.model == str(shell) and plan.batch == "input_ids 4 x 16, labels 4"
    assert (plan.adapters, len(plan.frozen)) == (13, 7)
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_patterns(shell: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    status, _, err = call(
        "plan", "--model", shell, *SIZE, "--frozen", "*.layer.1.*", "--recompute", "*.layer.1", "--json", path,
        "--padded", "--dtype", "bfloat16", "--r", 4, "--lora-dropout", 0.1, "--target-modules", "query,value,dense",
    )  # fmt: skip
    assert status == 0, err
    plan = MemoryPlan.from_dict(json.loads(path.read_text()))
    assert plan.recompute == ("bert.encoder.layer.1",) and all(".layer.1." in name for name in plan.frozen)
    assert plan.batch.endswith("padded")
    # Running it again keeps its input, since no layer that trains has the norm before it keep that, and where
    # transformers 5 makes each block one, a mask.
    again = plan.ours.by_part["recompute"]
    mask = again - 2 * 4 * 16 * 32
    assert plan.ours.by_block["bert.encoder.layer.1"] == again
    assert 0 <= mask < plan.ours.by_block["bert.encoder.layer.0"] / 10


def test_a_plan_for_a_gpu_needs_none(shell: Path, tmp_path: Path) -> None:
    status, out, err = call("plan", "--model", shell, *SIZE, "--device", "cuda", "--json", tmp_path / "plan.json")
    assert status == 0 and "labels 4, cuda: 0 of" in out, err
    assert MemoryPlan.from_dict(json.loads((tmp_path / "plan.json").read_text())).device == "cuda"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--frozen", "*.nowhere"), "frozen: '*.nowhere' matches no adapter"),
        (("--frozen", "*", "--frozen-fraction", 0.5), "expected one of them, got both; remove one"),
        (("--frozen-fraction", 2.0), "frozen: expected patterns or a share"),
        (("--task", "poetry"), "task must be one of seq-cls, causal-lm"),
        (("--lora-dropout", "nan"), "lora_dropout must lie in [0, 1], got nan"),
        (("--lora-dropout", -0.1), "lora_dropout must lie in [0, 1], got -0.1"),
        (("--classes", 0), "classes must be at least 1, got 0"),
        (("--dtype", "int8"), "dtype must be one of float32"),
        (("--device", "tpu"), "device: expected cpu or cuda"),
        (("--loss", "chunked"), "loss must be one of model, chunked, chunked only for causal-lm, got 'chunked'"),
        (("--sequence-length", 33), "sequence_length: expected at most the model's 32 positions, got 33"),
        (("--target-modules", "nothing"), "LoRA options: "),
    ],
)
def test_what_can_be_fixed_is_one_sentence(shell: Path, options: tuple[object, ...], named: str) -> None:
    status, _, err = call("plan", "--model", shell, *SIZE, *options)
    assert status == 2 and named in err and "Traceback" not in err


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    status, _, err = call("plan", "--model", tmp_path / "none")
    assert status == 2 and "there is no folder" in err
