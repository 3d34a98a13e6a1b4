"""Prints the README's tables from a results file of `make bench`, or writes them between the README's markers.

python bench/table.py bench/results/cpu.json [--write README.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Benchmark = dict[str, Any]


def rows_of(results: dict[str, Any], test: str, provider: str | None = None) -> list[Benchmark]:
    """The benchmarks of one test function, of one provider if it has several."""
    found = [b for b in results["benchmarks"] if b["name"].startswith(f"{test}[")]
    return [b for b in found if provider in (None, b["params"].get("provider"))]


def find(rows: list[Benchmark], like: Benchmark) -> Benchmark:
    """The row that differs from `like` in its provider alone."""
    wanted = {name: value for name, value in like["params"].items() if name != "provider"}
    return next(row for row in rows if {**row["params"], "provider": None} == {**wanted, "provider": None})


def ratio(benchmark: Benchmark) -> str:
    """Time relative to stock PEFT's."""
    return f"{benchmark['extra_info']['ratio']:.2f}"


def mib(benchmark: Benchmark) -> str:
    """Bytes retained for backward."""
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


def step_table(results: dict[str, Any]) -> list[str]:
    """A whole training step."""
    peft, rows = rows_of(results, "test_step", "peft"), []
    for safe in rows_of(results, "test_step", "safe"):
        stock, params = find(peft, safe), safe["params"]
        rows.append([f"{params['percent']} %", str(params["p"]), ratio(safe), ratio(stock), mib(stock), mib(safe)])
    return table(["frozen", "dropout", "**time**", "noise", "PEFT retains MiB", "we retain"], rows)


def scoring_table(results: dict[str, Any]) -> list[str]:
    """What scoring costs."""
    rows = []
    for row in rows_of(results, "test_scoring"):
        share = 100 * row["extra_info"]["share_of_training"]
        rows.append([str(row["params"]["p"]), ratio(row), str(row["extra_info"]["scorings"]), f"{share:.1f} %"])
    return table(["dropout", "scoring step / other step", "scorings in 160 steps", "share of training, at most"], rows)


def render(results: dict[str, Any], source: str) -> str:
    """All tables, with where they come from."""
    machine = results["machine_info"]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, peft {machine['peft']}, {results['datetime'][:10]}"
    )
    parts = [
        f"Times are ratios to stock PEFT with the same adapters frozen, fp32, run in turns, medians ({where}; "
        f"`make bench`, `{source}`). *Noise* is PEFT beside itself.",
        "A whole training step of MiniLM (real weights, 32 x 32 tokens, LoRA r 8 on all 36 linear layers, AdamW; the "
        "lowest adapters are frozen):",
        "\n".join(step_table(results)),
        "The op alone, forward and backward:",
        "\n".join(op_table(results)),
        "Scoring, with the default options:",
        "\n".join(scoring_table(results)),
    ]
    return "\n\n".join(parts)


def write(readme: Path, text: str) -> None:
    """Put the tables between the README's markers."""
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Read the arguments, print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", type=Path, help="the README to write into")
    arguments = parser.parse_args()
    text = render(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.results.as_posix())
    if arguments.write is None:
        print(text)
    else:
        write(arguments.write, text)


if __name__ == "__main__":
    main()
