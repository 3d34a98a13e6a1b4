"""Compares measured runs: the numbers of the comparison table, and a sentence with the result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .records import RunRecord, mebibytes

TITLES = {
    "stock": "stock PEFT LoRA",
    "bind": "fast path, no freezing",
    "safe": "SAFE",
    "bytes": "SAFE by bytes",
    "count": "SAFE by count",
    "cached": "SAFE, prefix cached",
    "random": "random control",
}


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


def by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs by method, in the order of first appearance.

    Example:
        >>> by_method([])
        {}
    """
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def title(method: str) -> str:
    """Return a method's display name.

    Example:
        >>> title("random")
        'random control'
    """
    return TITLES.get(method, method)


def comparison(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Return the runs as a table of text: a header, then one row per measure and one column per method.

    Args:
        runs: the measured runs; several seeds of one method give their mean and standard deviation.

    Returns:
        Rows of equal length. If runs of stock PEFT are included, costs have their ratio to stock PEFT.

    Example:
        >>> comparison([])
        [['']]
    """
    groups = by_method(runs)
    quality = "accuracy" if all(run.metric == "accuracy" for run in runs) else "perplexity"
    measures = (
        Measure(quality, lambda run: run.value, "{:.4g}" if quality == "perplexity" else "{:.3f}", False),
        *COSTS,
    )
    stock = groups.get("stock", [])
    rows = [["", *(title(method) for method in groups)]]
    for measure in measures if runs else ():
        if not measure.ratio or any(
            measure.of(run) for run in runs
        ):  # the reports of earlier versions have no FLOPs of the run
            rows.append([measure.title, *(_cell(measure, group, stock) for group in groups.values())])
    return rows


def _cell(measure: Measure, group: list[RunRecord], stock: list[RunRecord]) -> str:
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
    """Say which measures differ between the methods. Accuracies are compared by their standard error on the test set.

    Args:
        runs: runs of stock PEFT and of at least one other method; otherwise the result is empty.

    Returns:
        One to three sentences, or an empty string.

    Example:
        >>> verdict([])
        ''
    """
    groups = by_method(runs)
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
        f"{title(method)} froze {frozen:.0f} of {adapters} adapters. Compared with stock PEFT, a step retained "
        f"{mean:.2f} times the bytes on average and {end:.2f} times at the end; the run took {computed}"
        f"{seconds:.2f} times the processor time."
    )


def standard_error(accuracy: float, rows: int) -> float:
    """Return the binomial standard error of an accuracy.

    Args:
        accuracy: the share of correct answers, 0 to 1.
        rows: the number of test rows.

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
        return f"{figures}: on this task memory and time tell the methods apart, accuracy does not."
    if gap <= 2 * error:
        return f"{figures}: less than twice that error, so accuracy hardly tells the methods apart here."
    return f"{figures}: more than twice that error, so here accuracy differs too, and has to be weighed with the costs."
