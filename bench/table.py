"""Prints the tables of docs/benchmarks.md from the results of `make bench`, or writes them between its markers.

python bench/table.py bench/results/cpu-*.json [--write docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
INTRODUCTION = (
    "Measured by `make bench`. Times are medians in fp32, as ratios to stock PEFT with the same adapters frozen; both "
    "run in turns. *noise* is PEFT compared with itself."
)
Benchmark = dict[str, Any]
Params = dict[str, Any]


def rows_of(results: dict[str, Any], test: str, provider: str | None = None) -> list[Benchmark]:
    """Return the benchmarks of one test function, of only one provider if `provider` is given."""
    found = [b for b in results["benchmarks"] if b["name"].startswith(f"{test}[")]
    return [b for b in found if provider in (None, b["params"].get("provider"))]


def find(rows: list[Benchmark], like: Benchmark) -> Benchmark:
    """Return the row that differs from `like` only in its provider."""
    wanted = {name: value for name, value in like["params"].items() if name != "provider"}
    return next(row for row in rows if {**row["params"], "provider": None} == {**wanted, "provider": None})


def ratio(benchmark: Benchmark) -> str:
    """Return the time relative to stock PEFT."""
    return f"{benchmark['extra_info']['ratio']:.2f}"


def mib(benchmark: Benchmark) -> str:
    """Return the MiB retained for backward."""
    return f"{benchmark['extra_info']['retained_bytes'] / 2**20:.2f}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [" | ".join(["", *line, ""]).strip() for line in [header, ["---"] * len(header), *rows]]


def op_table(results: dict[str, Any]) -> list[str]:
    """The op, forward and backward."""
    peft, reference = (rows_of(results, "test_lora", name) for name in ("peft", "reference"))
    rows = []
    for safe in rows_of(results, "test_lora", "safe"):
        stock, params = find(peft, safe), safe["params"]
        slow = ratio(find(reference, safe))
        rows.append(
            [params["shape"], params["state"], str(params["p"]), ratio(safe), slow, ratio(stock), mib(stock), mib(safe)]
        )
    header = ["shape", "adapter", "dropout", "**time**", "reference", "noise", "PEFT retains MiB", "we retain"]
    return table(header, rows)


def step_table(
    results: dict[str, Any], test: str, columns: Mapping[str, Callable[[Params], str]], stock_name: str = "PEFT"
) -> list[str]:
    """A whole training step; the first columns show the parameters of the measurement."""
    stock, rows = rows_of(results, test, "peft"), []
    for safe in rows_of(results, test, "safe"):
        peft, params = find(stock, safe), safe["params"]
        rows.append([*(cell(params) for cell in columns.values()), ratio(safe), ratio(peft), mib(peft), mib(safe)])
    return table([*columns, "**time**", "noise", f"{stock_name} retains MiB", "we retain"], rows)


def dropout(params: Params) -> str:
    """A cell with the probability of dropout."""
    return str(params["p"])


def adapters(frozen: str) -> Callable[[Params], str]:
    """A cell that says which adapters train."""
    return lambda params: frozen if params["frozen"] else "all train"


def families_table(results: dict[str, Any]) -> list[str]:
    """A whole training step with each family of adapters."""
    rows = []
    for row in rows_of(results, "test_family_step"):
        params, facts = row["params"], row["extra_info"]
        sizes = f"{facts['stock_bytes'] / 2**20:.2f}", mib(row), f"{facts['retained_bytes'] / facts['stock_bytes']:.2f}"
        rows.append([params["family"], str(params["p"]), params["frozen"], ratio(row), *sizes])
    header = ["adapters", "dropout", "frozen", "**time**", "PEFT retains MiB", "we retain", "**ratio**"]
    return table(header, rows)


def smollm2_table(results: dict[str, Any]) -> list[str]:
    """A whole training step of a decoder."""
    rows = []
    for row in rows_of(results, "test_smollm2_step"):
        params, stock = row["params"], f"{row['extra_info']['stock_bytes'] / 2**20:.1f}"
        again = "yes" if params["recompute"] else "no"
        rows.append([params["frozen"], str(params["p"]), again, ratio(row), stock, mib(row)])
    header = ["blocks frozen", "dropout", "run again in backward", "**time**", "PEFT retains MiB", "we retain"]
    return table(header, rows)


def scoring_table(results: dict[str, Any]) -> list[str]:
    """The cost of scoring."""
    rows = []
    for row in rows_of(results, "test_scoring"):
        share = 100 * row["extra_info"]["share_of_training"]
        rows.append([str(row["params"]["p"]), ratio(row), str(row["extra_info"]["scorings"]), f"{share:.1f} %"])
    return table(["dropout", "scoring step / other step", "scoring steps in 160", "share of training, at most"], rows)


def retention_table(results: dict[str, Any]) -> list[str]:
    """Bytes retained by a forward, compared with stock PEFT with the same adapters frozen and with none frozen."""
    rows = []
    for row in rows_of(results, "test_retention"):
        params, facts = row["params"], row["extra_info"]
        frozen = params["frozen"] + (", run again in backward" if params["recompute"] else "")
        stock, ours = (f"{facts[name] / 2**20:.1f}" for name in ("stock_nothing_bytes", "retained_bytes"))
        ratios = (f"{facts[name]:.2f}" for name in ("ratio_nothing", "ratio_same"))
        rows.append([f"{params['shape']}, {params['dtype']}", str(params["p"]), frozen, stock, ours, *ratios])
    header = ["shape", "dropout", "frozen", "PEFT MiB, nothing frozen", "ours", "**ratio**", "ratio, same frozen"]
    return table(header, rows)


def cumulative_table(results: dict[str, Any]) -> list[str]:
    """The techniques, added one after the other."""
    rows, all_rows = [], rows_of(results, "test_cumulative")
    by_p = {p: [row for row in all_rows if row["params"]["p"] == p] for p in (0.0, 0.1)}
    for plain, dropped in zip(by_p[0.0], by_p[0.1], strict=True):
        facts = plain["extra_info"]
        deviations = [f"{facts[name]:.0e}" for name in ("loss_deviation", "gradient_deviation")]
        rows.append([facts["technique"], mib(plain), ratio(plain), mib(dropped), ratio(dropped), *deviations])
    header = ["", "MiB, dropout 0", "time", "MiB, dropout 0.1", "time", "loss differs by", "gradients differ by"]
    return table(header, rows)


def peak_table(results: dict[str, Any]) -> list[str]:
    """Peak memory of a process."""
    rows = []
    for row in rows_of(results, "test_peak"):
        params, facts = row["params"], row["extra_info"]
        sizes = (f"{facts[name] / 2**20:,.0f}" for name in ("stock_peak_rss", "peak_rss"))
        change = f"{100 * (facts['ratio'] - 1):+.1f} %"
        rows.append([params["loss"], str(params["p"]), params["frozen"], *sizes, change])
    return table(["loss", "dropout", "blocks frozen", "PEFT MiB, nothing frozen", "ours", "**change**"], rows)


def launch_table(results: dict[str, Any]) -> list[str]:
    """Processor time per call of a GPU op."""
    rows = []
    for row in rows_of(results, "test_launches"):
        facts = row["extra_info"]
        python, ours = (1e6 * time / facts["calls"] for time in (facts["competitor_median"], row["stats"]["p50"]))
        rows.append([row["params"]["case"], str(facts["launches"]), f"{python:.0f}", f"{ours:.1f}", ratio(row)])
    return table(["", "kernels", "launched by Python, us", "replayed, us", "**ratio**"], rows)


SECTIONS = (
    (
        "One technique after the other, on a Llama-shaped model (8 blocks, d 512, 1,024 tokens, LoRA r 16 on every "
        "linear layer): bytes that a training forward retains, time per step, and relative differences of loss "
        "and gradients from stock PEFT with the same adapters frozen, without dropout:",
        "test_cumulative",
        cumulative_table,
    ),
    (
        "Bytes retained by a training forward, for shapes of several families (8 blocks, d 512, 1,024 tokens):",
        "test_retention",
        retention_table,
    ),
    (
        "Peak memory of a process that trains SmolLM2-135M (real weights, fp32, 4 x 512 tokens, LoRA r 16 on every "
        "linear layer). *model* is the model's own loss, *chunked* is `chunked_loss`, on both sides:",
        "test_peak",
        peak_table,
    ),
    (
        "A whole training step of SmolLM2-135M (256 tokens; PEFT with the same blocks frozen):",
        "test_smollm2_step",
        smollm2_table,
    ),
    (
        "A whole training step of MiniLM (real weights, 32 x 32 tokens, LoRA r 8 on all 36 linear layers, AdamW; the "
        "lowest adapters are frozen):",
        "test_step",
        partial(step_table, test="test_step", columns={"frozen": lambda p: f"{p['percent']} %", "dropout": dropout}),
    ),
    (
        "A whole training step with each [family of adapters](adapters.md), of a BERT or a GPT-2 with random weights "
        "(2 blocks, d 384, MLP of 768, 64 x 12 tokens, LoRA r 4, bottlenecks of 96 units, AdamW). The rows "
        "*noise* show how far a time may be off:",
        "test_family_step",
        families_table,
    ),
    (
        "A whole training step of a BERT-shaped model with bottleneck adapters after attention and MLP (2 blocks, "
        "d 768, 48 hidden units, 8 x 64 tokens, AdamW), compared with the same tuner unbound:",
        "test_bottleneck_step",
        partial(
            step_table,
            test="test_bottleneck_step",
            columns={
                "activation": lambda p: p["non_linearity"],
                "dropout": dropout,
                "adapters": adapters("all but the lowest block's frozen"),
            },
            stock_name="unbound",
        ),
    ),
    (
        "A whole training step of a UNet's residual blocks with LoRA r 8 on every convolution (2 blocks, 320 channels, "
        "2 x 32 x 32 positions, AdamW):",
        "test_conv_step",
        partial(
            step_table,
            test="test_conv_step",
            columns={"dropout": dropout, "adapters": adapters("all but the lowest block's frozen")},
        ),
    ),
    (
        "A whole training step with LoRA r 8 on the experts' parameters and on attention (2 blocks, d 256, 2 x 256 "
        "tokens, AdamW):",
        "test_experts_step",
        partial(
            step_table,
            test="test_experts_step",
            columns={"shape": lambda p: p["shape"], "adapters": adapters("the experts' frozen")},
        ),
    ),
    ("Scoring, with the default options:", "test_scoring", scoring_table),
    ("`lora` alone, forward and backward:", "test_lora", op_table),
    (
        "Processor time per call of a GPU op, with a driver that runs nothing (no GPU is needed). Triton's launcher in "
        "Python and `csrc/launch_replay` make the same launches:",
        "test_launches",
        launch_table,
    ),
)


def render(results: dict[str, Any], source: str) -> str:
    """Return the tables of one file of results, with machine and versions."""
    machine = results["machine_info"]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, peft {machine['peft']}, {results['datetime'][:10]}; `{source}`"
    )
    found = [(text, make) for text, test, make in SECTIONS if rows_of(results, test)]
    return "\n\n".join([f"*{where}*", *(f"{text}\n\n" + "\n".join(make(results)) for text, make in found)])


def write(page: Path, text: str) -> None:
    """Put the tables between the page's markers."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Read the arguments, print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--write", type=Path, help="the page to write into")
    arguments = parser.parse_args()
    files = [(json.loads(path.read_text(encoding="utf-8")), path.as_posix()) for path in arguments.results]
    text = "\n\n".join([INTRODUCTION, *(render(results, source) for results, source in files)])
    if arguments.write is None:
        print(text)
    else:
        write(arguments.write, text)


if __name__ == "__main__":
    main()
