"""Peak memory of the training steps, planned without a GPU, compared with the measurements of the same steps.

python -m bench.gpu.planned [--sizes 1B 8B] [--measured bench/results/gpu.json]

A plan does not include the workspaces of CUDA's libraries; cuBLAS alone has 64 MiB on an H200.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safe_peft.planning.inputs import inputs_for
from safe_peft.planning.tracing import trace

from .llama import LAYOUTS, SHAPES, TOKENS, chunked_loss, freeze, make_model
from .results import read

PROVIDERS = ("peft", "safe", "peft, chunked loss", "safe, chunked loss", "peft, float32", "safe, float32")
"""What can be planned. The bytes that Liger and Inductor retain depend on kernels that need a GPU."""
MEASURED = Path(__file__).parents[1] / "results/gpu.json"
OPTIMIZER_STATES = 2


class Row(NamedTuple):
    """The bytes of one step; `measured` is 0 if there is no measurement."""

    size: str
    provider: str
    frozen: str
    planned: int
    measured: int


def plan(size: str, provider: str, frozen: str) -> int:
    """Return the peak of a step of `steps`, in bytes: parameters, optimizer state, and all tensors of the step."""
    who, _, further = provider.partition(", ")
    model = make_model(SHAPES[size], torch.device("meta"), single=further == "float32")
    freeze(model, frozen)
    loss = (lambda model, batch: chunked_loss(model, batch["input_ids"])) if further == "chunked loss" else None
    inputs = inputs_for(model, *TOKENS[size])
    return trace(model, inputs, fast=who == "safe", device="cuda", loss=loss).whole(OPTIMIZER_STATES)


def rows(sizes: Iterable[str], measured: dict[str, Any]) -> Iterator[Row]:
    """Yield each step, first those with nothing frozen."""
    peaks = {
        (row["size"], row["provider"], row["frozen"]): row["peak_bytes"]
        for row in measured["parts"].get("steps", {}).get("rows", ())
        if "peak_bytes" in row
    }
    for case in product(sizes, PROVIDERS, LAYOUTS):
        yield Row(*case, plan(*case), peaks.get(case, 0))


def line(row: Row, stock: int) -> str:
    """Its bytes, and how they compare with PEFT's of the same loss and with nothing frozen."""
    share = f"{row.planned / stock - 1:+7.1%}"
    measured = f"{row.measured / 2**20:9,.0f} measured ({row.planned / row.measured - 1:+.1%})" if row.measured else ""
    return f"{row.size:<5} {row.provider:<20} {row.frozen:<21} {row.planned / 2**20:9,.0f} MiB {share}  {measured}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SHAPES), default=["1B", "8B"])
    parser.add_argument("--measured", type=Path, default=MEASURED, help="what bench/gpu.sh wrote")
    options = parser.parse_args()
    stock: dict[tuple[str, str], int] = {}
    for row in rows(options.sizes, read(options.measured)):
        shape = row.size, row.provider.partition(", ")[2]
        print(line(row, stock.setdefault(shape, row.planned)).rstrip(), flush=True)


if __name__ == "__main__":
    main()
