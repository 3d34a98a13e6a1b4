"""The experiments of docs/evidence.md, with a few steps: they continue from one state, and go on where they stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evidence import arms, flatness, oracle, picture, results, table
from evidence.tasks import TASKS, Data, Task, with_swapped_words
from evidence.training import Training, forked
from releases import TRANSFORMERS_4

from safe_peft import SafeConfig

TASK = Task(steps=6, fork=3, batch_size=4, max_length=16, test_rows=12)


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(TASK)


def test_a_training_from_the_fork_is_the_training_without_it(data: Data, tmp_path: Path) -> None:
    whole = Training(TASK, data, seed=1)
    whole.run(TASK.steps)
    forked(TASK, data, 1, tmp_path)
    parted = forked(TASK, data, 1, tmp_path)
    parted.run(TASK.steps)
    for name, parameter in whole.named.items():
        assert torch.equal(parameter, parted.named[name]), name
    assert parted.test() == whole.test()


def test_neighbouring_words_are_swapped_where_the_label_says_so() -> None:
    texts = ["a film that I like", "so so", "one", "it is too long for me"] * 10
    found = with_swapped_words([(text, 7) for text in texts])
    assert found == with_swapped_words([(text, 7) for text in texts]) and {label for _, label in found} == {0, 1}
    for before, (after, label) in zip(texts, found, strict=True):
        old, new = before.split(), after.split()
        moved = [place for place, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
        assert sorted(old) == sorted(new) and len(moved) == 2 * label
        assert label == 0 or moved[1] == moved[0] + 1


@pytest.mark.slow
def test_the_text_task_is_judged_by_token(tmp_path: Path) -> None:
    task = replace(TASKS["text"], steps=2, fork=1, batch_size=2, max_length=8, test_rows=3)
    data = Data(task)
    training = forked(task, data, 0, tmp_path)
    assert list(oracle.units(training))[:3] == ["0.attention", "0.mlp", "1.attention"]
    training.run(task.steps)
    (batch,) = data.tests()
    training.model.eval()
    with torch.no_grad():
        expected = float(training.model(**batch).loss)
    assert training.test()["cross_entropy"] == pytest.approx(expected, rel=1e-5)


def test_every_arm_has_options_that_are_valid() -> None:
    for part, found in arms.PARTS.items():
        assert all(arms.options(part, arm, 3).seed == 3 for arm in found)
    for part, arm in arms.DEFAULTS.items():
        assert arms.options(part, arm, 0) == SafeConfig(), arm


@pytest.mark.slow
def test_the_oracle_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "score_names", lambda: ("cka", "realised"))
    chosen = ["0.mlp", "3.attention", "5.mlp"]
    steps = oracle.run(TASK, [0], tmp_path, tmp_path / "forks", chosen)
    assert next(steps).startswith("oracle-0-nothing.json")
    steps.close()
    before = (tmp_path / "oracle-0-nothing.json").stat().st_mtime_ns
    done = list(oracle.run(TASK, [0], tmp_path, tmp_path / "forks", chosen))
    assert len([line for line in done if line.startswith("oracle")]) == 3
    assert (tmp_path / "oracle-0-nothing.json").stat().st_mtime_ns == before
    assert list(oracle.run(TASK, [0], tmp_path, tmp_path / "forks", chosen)) == []
    assert set(oracle.prices(tmp_path)) == set(chosen)
    scores = json.loads((tmp_path / "scores-0-cka.json").read_text())["importance"]
    assert len(scores) == 36 and all(value > 0 for value in scores.values())
    lines = oracle.summary(tmp_path)
    assert any(line.startswith("| block 0, mlp | ") for line in lines) and any("| cka | " in line for line in lines)


def test_a_frozen_unit_does_not_change(data: Data, tmp_path: Path) -> None:
    training = forked(TASK, data, 0, tmp_path)
    members = oracle.units(training)
    assert len(members) == 12 and sum(map(len, members.values())) == 36
    training.freeze(members["2.mlp"])
    before = {name: parameter.clone() for name, parameter in training.named.items()}
    training.run(TASK.steps)
    same = {name for name, parameter in training.named.items() if torch.equal(parameter, before[name])}
    assert len(same) == 4 and all("layer.2.intermediate" in name or "layer.2.output" in name for name in same)


@pytest.mark.parametrize(("part", "arm"), [("screening", "random_sets recomputed"), ("windows", "0.1 to 0.3")])
def test_an_arm_frees_bytes_and_flops(part: str, arm: str, tmp_path: Path) -> None:
    task = replace(TASK, steps=20)
    results.write(
        tmp_path / "oracle-0-nothing.json", {"seed": 0, "unit": oracle.NOTHING, "cross_entropy": 0.5, "accuracy": 0.75}
    )
    assert len(list(arms.run(part, task, [0], tmp_path, tmp_path / "forks", [arm]))) == 1
    assert list(arms.run(part, task, [0], tmp_path, tmp_path / "forks", [arm])) == []
    (path,) = tmp_path.glob(f"{part}-*.json")
    found = json.loads(path.read_text())
    assert len(found["curve"]) == 20 and found["curve"][:3] == [1.0] * 3
    assert 0 < found["bytes_end"] < found["bytes"] < 1 and found["frozen"]
    assert found["flops"] > 0
    assert arms.summary(part, tmp_path)[-1].startswith(f"| {arm} | {found['bytes_end']:.2f} | ")
    picture.draw(tmp_path, (part,), tmp_path / "picture.svg")
    assert f"<!-- {arm} (1) -->" in (tmp_path / "picture.svg").read_text()


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 cannot take another attention after loading")
def test_the_sharpness_is_that_of_the_loss_whatever_the_scale_of_the_factors(data: Data) -> None:
    training = Training(TASK, data, seed=0)
    training.run(TASK.steps)
    training.binding.detach()
    first = flatness.sharpness(training, rows=6)
    factors = {name: p for name, p in training.named.items() if "lora_" in name}
    assert all(p.requires_grad for p in factors.values()) and first["eigenvalue"] > 0 and first["sam"] > 0
    with torch.no_grad():
        for name, p in factors.items():
            p.mul_(4.0 if "lora_A" in name else 0.25)
    again = flatness.sharpness(training, rows=6)
    assert again == pytest.approx(first, rel=1e-2)


def test_balanced_factors_have_the_same_singular_values_and_product(data: Data) -> None:
    training = Training(TASK, data, seed=0)
    training.run(TASK.steps)
    layer = next(m for m in training.model.modules() if hasattr(m, "lora_A"))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = up.detach() @ down.detach()
    flatness.balance(training.model)
    torch.testing.assert_close(up.detach() @ down.detach(), before, rtol=1e-4, atol=1e-6)
    values = [torch.linalg.svdvals(factor.detach()) for factor in (down, up)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-5)


def test_lanczos_finds_the_largest_eigenvalue() -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    matrix = basis * torch.tensor([9.0, 7.0] + [0.1 * i - 2.0 for i in range(38)], dtype=torch.float64) @ basis.T
    found = flatness.largest_eigenvalue(lambda vector: matrix @ vector, torch.randn(40, dtype=torch.float64))
    assert found == pytest.approx(9.0, rel=1e-3)
    exact = flatness.largest_eigenvalue(lambda vector: matrix @ vector, basis[:, 1].clone())
    assert exact == pytest.approx(7.0, rel=1e-6)  # a start inside an invariant space ends early


def test_rank_correlation() -> None:
    assert oracle.spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]) == 1.0
    assert oracle.spearman([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) == -1.0
    assert oracle.spearman([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]) == pytest.approx(0.8)


def test_the_table_of_a_small_model() -> None:
    lines = table.lines(layers=2)
    assert len(lines) == 7 and "full fine-tuning" in lines[2] and "lowest 75% frozen" in lines[-1]
