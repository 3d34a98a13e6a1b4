"""A report's tables as text, and a sentence that compares the measured runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..planning.plan import MemoryPlan, parts_cells, text_table
from .records import RunRecord, mebibytes

if TYPE_CHECKING:
    from .report import FreezeReport

TITLES = {
    "stock": "stock PEFT",
    "bind": "fast path, no freezing",
    "safe": "SAFE",
    "bytes": "SAFE by bytes",
    "count": "SAFE by count",
    "cached": "SAFE, prefix cached",
    "random": "random control",
}
"""Names of the methods for readers."""


class Measure(NamedTuple):
    """A row of the comparison: title, function of a run, format, and whether it has a ratio."""

    title: str
    of: Callable[[RunRecord], float]
    form: str
    ratio: bool = True


COSTS = (
    Measure("retained MiB/step, start", lambda run: mebibytes(run.retained[0][1]), "{:,.1f}"),
    Measure("retained MiB/step, end", lambda run: mebibytes(run.retained[-1][1]), "{:,.1f}"),
    Measure("retained MiB/step, mean of the run", lambda run: mebibytes(run.retained_mean), "{:,.1f}"),
    Measure("peak RSS, MiB", lambda run: mebibytes(run.peak_rss), "{:,.0f}"),
    Measure("kept outputs of the prefix, MiB", lambda run: mebibytes(run.prefix_bytes), "{:,.1f}"),
    Measure("GFLOPs/step, start", lambda run: run.flops_start / 1e9, "{:,.1f}"),
    Measure("GFLOPs/step, end", lambda run: run.flops_end / 1e9, "{:,.1f}"),
    Measure("TFLOPs of the run, scoring included", lambda run: run.flops_run / 1e12, "{:,.2f}"),
    Measure("processor seconds of training", lambda run: run.seconds, "{:,.1f}"),
    Measure("adapters frozen", lambda run: run.frozen, "{:.0f}", ratio=False),
)


# ---------------------------------------------------------------- adapters


def adapter_cells(report: FreezeReport) -> list[list[str]]:
    """Return the adapters as text: a header, then one row per adapter, ordered by layer."""
    frozen = {freezing.name: str(freezing.step) for freezing in report.freezings}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for scoring in report.scorings:
        last |= scoring.importance
        first = scoring.importance | first
    rows = [["layer", "adapter", "parameters", "importance, first", "importance, last", "frozen after step"]]
    for row in report.rows():
        layer = str(row.layer) if row.layer >= 0 else ""
        importances = [_importance(found.get(row.name)) for found in (first, last)]
        rows.append([layer, row.label, f"{row.parameters:,}", *importances, frozen.get(row.name, "")])
    return rows


def _importance(value: float | None) -> str:
    if value is None:
        return ""
    return "undefined" if math.isnan(value) else f"{value:.2e}"


def adapter_table(report: FreezeReport) -> str:
    """Return one line per adapter: parameters, first and last importance, and the step of its freeze event."""
    title = f"{len(report.freezings)} of {len(report.adapters)} adapters frozen in {report.total_steps} steps"
    return text_table(adapter_cells(report), title, left=2)


def plans_table(plans: Sequence[tuple[str, MemoryPlan]]) -> str:
    """Return a table of memory plans, stock PEFT and the fast path; each plan has a heading, such as "start"."""
    return text_table(parts_cells(plans), f"where each byte goes: {plans[0][1].batch}" if plans else "")


# ---------------------------------------------------------------- measured runs


def runs_table(runs: Sequence[RunRecord], title: str = "") -> str:
    """Return the measured runs side by side, one column per method."""
    return text_table(comparison(runs), title)


def comparison(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Return the runs as a table of text: a header, then one row per measure and one column per method.

    Several seeds of one method give their mean and standard deviation. If runs of stock PEFT are included, costs have
    their ratio to stock PEFT.
    """
    groups = _by_method(runs)
    quality = "accuracy" if all(run.metric == "accuracy" for run in runs) else "perplexity"
    form = "{:.4g}" if quality == "perplexity" else "{:.3f}"
    measures = (Measure(quality, lambda run: run.value, form, ratio=False), *COSTS)
    rows = [["", *(TITLES.get(method, method) for method in groups)]]
    for measure in measures if runs else ():
        # The reports of earlier versions have no FLOPs of the run.
        if not measure.ratio or any(measure.of(run) for run in runs):
            rows.append([measure.title, *(_cell(measure, group, groups.get("stock")) for group in groups.values())])
    return rows


def _by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def _cell(measure: Measure, group: list[RunRecord], stock: list[RunRecord] | None) -> str:
    values = [float(measure.of(run)) for run in group]
    mean = statistics.fmean(values)
    text = measure.form.format(mean)
    if len(values) > 1:
        text += " ± " + measure.form.format(statistics.stdev(values))
    if measure.title == "adapters frozen":
        text += f" of {group[0].adapters}"
    base = statistics.fmean(measure.of(run) for run in stock) if stock else 0.0
    return text + (f"  ({mean / base:.2f}×)" if measure.ratio and base and group is not stock else "")


def verdict(runs: Sequence[RunRecord]) -> str:
    """Return one to three sentences that say which measures differ between stock PEFT and the other methods.

    Accuracies are compared by their standard error on the test set. Without another method the result is empty.
    """
    groups = _by_method(runs)
    others = {method: group for method, group in groups.items() if method not in ("stock", "random")}
    if "stock" not in groups or not others:
        return ""
    sentences = [_cost_sentence(method, group, groups["stock"]) for method, group in others.items()]
    if all(run.metric == "accuracy" for run in runs):
        sentences.append(_accuracy_sentence(groups))
    return " ".join(sentences)


def _cost_sentence(method: str, group: list[RunRecord], stock: list[RunRecord]) -> str:
    def ratio(of: Callable[[RunRecord], float]) -> float:
        base = statistics.fmean(of(run) for run in stock)
        return statistics.fmean(of(run) for run in group) / base if base else math.nan

    mean, end = ratio(lambda run: run.retained_mean), ratio(lambda run: run.retained[-1][1])
    flops, seconds = ratio(lambda run: run.flops_run), ratio(lambda run: run.seconds)
    computed = f"{flops:.2f} times the FLOPs and " if math.isfinite(flops) else ""
    frozen, adapters = statistics.fmean(run.frozen for run in group), group[0].adapters
    return (
        f"{TITLES.get(method, method)} froze {frozen:.0f} of {adapters} adapters. Compared with stock PEFT, a step "
        f"retained {mean:.2f} times the bytes on average and {end:.2f} times at the end; the run took {computed}"
        f"{seconds:.2f} times the processor time."
    )


def standard_error(accuracy: float, rows: int) -> float:
    """Return the binomial standard error of an accuracy in [0, 1] on a number of test rows.

    Example:
        >>> standard_error(0.5, 100)
        0.05
    """
    return math.sqrt(accuracy * (1.0 - accuracy) / rows)


def _accuracy_sentence(groups: dict[str, list[RunRecord]]) -> str:
    """Compare the largest difference in accuracy with the standard error of such a difference.

    All seeds use the same test rows, so more seeds do not reduce this error.
    """
    means = {method: statistics.fmean(run.value for run in group) for method, group in groups.items()}
    rows = groups["stock"][0].eval_rows
    error = math.sqrt(2.0) * standard_error(means["stock"], rows)
    gap = max(abs(mean - means["stock"]) for mean in means.values())
    figures = (
        f"Accuracies lie at most {100 * gap:.1f} points from stock PEFT's, and the standard error of such a difference "
        f"on {rows:,} test rows is {100 * error:.1f} points"
    )
    if gap <= error:
        return f"{figures}: on this task the methods differ in memory and time, but not measurably in accuracy."
    if gap <= 2 * error:
        return f"{figures}: less than twice that error, so the accuracies hardly differ."
    return f"{figures}: more than twice that error, so the accuracies differ too."
