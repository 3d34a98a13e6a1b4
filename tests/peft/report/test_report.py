"""The report: strict JSON, and views of it that show what is in it."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safe_peft import StateError
from safe_peft.files import jsonio
from safe_peft.planning.retained import MIB
from safe_peft.report.records import AdapterRecord, Freezing, RunRecord, Scoring
from safe_peft.report.report import FreezeReport
from safe_peft.report.tables import comparison, runs_table, standard_error, verdict

PARTS = ("attention.query", "attention.key", "output.dense")


def make_run(
    method: str, value: float = 0.8, frozen: int = 0, end: int = 100, seed: int = 0, rows: int = 2000
) -> RunRecord:
    retained = ((0, 100 * MIB), (20, end * MIB))
    seconds = float(end)
    return RunRecord(
        method, seed, "accuracy", value, rows, 20, 36, frozen, seconds, 900 * MIB, retained, 8 * 10**9, 6 * 10**9
    )


def make_report(layers: int = 12, steps: int = 20) -> FreezeReport:
    """Importance rises with depth and time; the lower half freezes in two batches, one adapter was never scored."""
    names = [f"base_model.model.encoder.layer.{i}.{part}" for i in range(layers) for part in PARTS]
    level = {name: 1e-6 * 10 ** (4 * i / len(names)) for i, name in enumerate(names)}
    first, second = names[: len(names) // 4], names[len(names) // 4 : len(names) // 2]
    scorings = []
    for step in range(2, steps + 1, 2):
        live = [name for name in names if not (step > 8 and name in first) and not (step > 12 and name in second)]
        importance = {name: level[name] * step for name in live}
        importance[names[-1]] = math.nan
        scorings.append(Scoring(step, level[first[-1]] if step >= 8 else None, importance))
    freezings = [Freezing(8, name, level[name] * 8, 1e-5) for name in first]
    freezings += [Freezing(12, name, level[name] * 12, None) for name in second]
    return FreezeReport(
        model="tiny <model> & more",
        config={"score": "cka", "target_fraction": 0.5},
        total_steps=steps,
        adapters=tuple(AdapterRecord(name, 512) for name in names),
        scorings=tuple(scorings),
        freezings=tuple(freezings),
        retained=((0, 100 * MIB), (8, 70 * MIB), (12, 40 * MIB)),
        runs=(make_run("stock"), make_run("safe", 0.79, 18, 40), make_run("random", 0.81, 18, 60)),
    )


def through_json(report: FreezeReport) -> FreezeReport:
    return FreezeReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


def test_json_round_trip_keeps_everything_even_an_importance_that_is_not_finite(tmp_path: Path) -> None:
    report = make_report()
    back = through_json(report)
    name = report.adapters[-1].name
    assert math.isnan(back.scorings[0].importance[name])
    assert jsonio.encode(back) == jsonio.encode(report)  # NaN does not equal itself
    report.save_json(tmp_path / "new" / "report.json")
    assert jsonio.encode(FreezeReport.load(tmp_path / "new" / "report.json")) == jsonio.encode(report)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


def set_at(*path: Any, value: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def remove(key: str) -> Any:
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_at("format", value="other"), "not a report"),
        (set_at("version", value=99), "expected 1, got 99"),
        (remove("adapters"), "lacks adapters"),
        (set_at("extra", value=1), "extra"),
        (set_at("model", value=3), "report.model"),
        (set_at("total_steps", value=True), "report.total_steps"),
        (set_at("scorings", 0, "step", value="2"), "scorings[0].step"),
        (set_at("scorings", 0, "importance", value=[1.0]), "scorings[0].importance"),
        (set_at("retained", 0, value=[0]), "retained[0]"),
        (set_at("runs", 0, "seconds", value="fast"), "runs[0].seconds"),
    ],
)
def test_a_report_of_another_form_is_refused_and_the_place_named(change: Any, says: str) -> None:
    data = deepcopy(make_report().to_dict())
    change(data)
    with pytest.raises(StateError, match=re.escape(says)):
        FreezeReport.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "[1, 2]", "null", "\xff"])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StateError):
        FreezeReport.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"report\.json does not exist"):
        FreezeReport.load(tmp_path / "report.json")


def test_rows_are_ordered_by_layer_not_by_name() -> None:
    names = ["m.layer.10.query", "m.layer.2.query", "m.layer.2.key", "head"]
    rows = FreezeReport("m", {}, 1, tuple(AdapterRecord(name, 1) for name in names)).rows()
    assert [(row.layer, row.label) for row in rows] == [(-1, "head"), (2, "query"), (2, "key"), (10, "query")]


def test_the_table_names_every_adapter_and_when_it_froze() -> None:
    report = make_report()
    title, heads, *rows = str(report).splitlines()
    assert title == "18 of 36 adapters frozen in 20 steps"
    assert heads.split("  ")[-1].strip() == "frozen after step" and len(rows) == len(report.adapters) == 36
    assert all(
        adapter.name.rpartition("layer.")[2].split(".", 1)[1] in row
        for adapter, row in zip(report.adapters, rows, strict=True)
    )
    assert "undefined" in rows[-1]  # the one with no finite importance


def size_of_png(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("layers", [2, 12, 70])
def test_the_picture_is_drawn_for_few_and_for_many_adapters(tmp_path: Path, layers: int) -> None:
    make_report(layers).save_png(tmp_path / "report.png")
    width, height = size_of_png((tmp_path / "report.png").read_bytes())
    assert width == 1650
    assert 1000 < height < 2600
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


EMPTY = FreezeReport("m", {}, 10, (AdapterRecord("layer.0.query", 4),))


@pytest.mark.parametrize(
    "report",
    [
        FreezeReport("m", {}, 0, ()),
        EMPTY,
        replace(EMPTY, scorings=(Scoring(1, None, {"layer.0.query": 0.0}),)),
        replace(EMPTY, scorings=(Scoring(1, 0.0, {"layer.0.query": math.nan}), Scoring(2, None, {}))),
        replace(
            EMPTY,
            scorings=(Scoring(1, 0.5, {"layer.0.query": 0.5}),),
            freezings=(Freezing(1, "layer.0.query", 0.5, 0.5),),
        ),
        replace(EMPTY, freezings=(Freezing(10, "layer.0.query", math.nan, None),), retained=((0, 5),)),
    ],
    ids=["nothing", "unscored", "zero", "undefined", "one-scoring", "frozen-unscored"],
)
def test_unusual_reports_are_drawn_too(tmp_path: Path, report: FreezeReport) -> None:
    report.save_png(tmp_path / "report.png")
    report.save_html(tmp_path / "report.html")
    assert str(report)


def test_the_page_holds_the_numbers_and_needs_nothing_outside_itself(tmp_path: Path) -> None:
    make_report().save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "tiny &lt;model&gt; &amp; more" in page
    assert "prefers-color-scheme: dark" in page
    for number in ("40.0  (0.40×)", "73,400,320", "0.790", "1.00e-05"):
        assert number in page


def test_reading_and_drawing_a_report_touches_neither_torch_nor_pyplot(tmp_path: Path) -> None:
    make_report(2).save_json(tmp_path / "report.json")
    code = (
        "import sys; from safe_peft import FreezeReport\n"
        f"r = FreezeReport.load({str(tmp_path / 'report.json')!r}); str(r)\n"
        f"r.save_png({str(tmp_path / 'report.png')!r})\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'peft', 'matplotlib.pyplot')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_comparison_gives_ratios_to_stock_and_spread_over_seeds() -> None:
    runs = [
        make_run("stock", 0.8),
        make_run("stock", 0.9, seed=1),
        make_run("safe", 0.8, 18, 40),
        make_run("safe", 0.8, 18, 60),
    ]
    rows = {row[0]: row[1:] for row in comparison(runs)}
    assert rows[""] == ["stock PEFT", "SAFE"]
    assert rows["accuracy"] == ["0.850 ± 0.071", "0.800 ± 0.000"]
    assert rows["retained MiB/step, end"] == ["100.0 ± 0.0", "50.0 ± 14.1  (0.50×)"]
    assert rows["adapters frozen"] == ["0 ± 0 of 36", "18 ± 0 of 36"]
    assert len(runs_table(runs).splitlines()) == 10
    assert "TFLOPs of the run, scoring included" not in rows, "unknown in these runs"


def test_costs_of_a_run_are_sums_over_its_steps() -> None:
    stock = replace(make_run("stock"), retained=((0, 100 * MIB),), flops_run=40 * 10**12)
    safe = replace(make_run("safe", frozen=18), retained=((0, 80 * MIB), (10, 40 * MIB)), flops_run=20 * 10**12)
    rows = {row[0]: row[1:] for row in comparison([stock, safe])}
    assert rows["retained MiB/step, mean of the run"] == ["100.0", "60.0  (0.60×)"]
    assert rows["TFLOPs of the run, scoring included"] == ["40.00", "20.00  (0.50×)"]
    assert "a step retained 0.60 times the bytes on average and 0.40 times at the end" in verdict([stock, safe])
    assert "0.50 times the FLOPs and" in verdict([stock, safe])


@pytest.mark.parametrize(
    ("accuracy", "says"),
    [
        (0.805, "differ in memory and time, but not measurably in accuracy"),
        (0.780, "less than twice that error"),
        (0.700, "the accuracies differ too"),
    ],
)
def test_the_verdict_judges_accuracy_by_the_error_of_the_test_set(accuracy: float, says: str) -> None:
    text = verdict([make_run("stock", 0.8), make_run("safe", accuracy, 27, 30)])
    assert says in text
    assert "27 of 36" in text
    assert "0.30 times at the end; the run took 0.30 times the processor time" in text
    assert f"{math.sqrt(2) * 100 * standard_error(0.8, 2000):.1f} points" in text


def test_there_is_no_verdict_on_one_method() -> None:
    assert verdict([make_run("safe")]) == ""
