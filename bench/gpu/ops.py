"""Times single ops. If a provider cannot run, the reason is in the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import safe_kernels
from safe_kernels.triton.runtime import tuning

from .machine import arguments, ceilings, device_ms, device_of, median_ms, under_load
from .op_cases import Case, Shapes, linear_case, lora_cases, score_case
from .results import go_on_after, reason, recording, seconds_left, so_far, update
from .rowwise_cases import rowwise_cases

OWN = ("safe", "fused")
Note = Callable[..., None]
Wants = Callable[[str], bool]


def main() -> None:
    options = arguments(__doc__ or "")
    note = partial(_note, options.out, options.part)
    before = so_far(options.out, options.part)
    rows = {key(row["case"], row): row for row in before.get("rows", [])}
    passes: list[Wants] = [lambda provider: provider != "compile", lambda provider: provider == "compile"]
    with recording(options.out, options.part), safe_kernels.autotune(options.autotune):
        device = device_of(options)
        torch.manual_seed(0)
        limits = before.get("ceilings") or ceilings(device)
        note(ceilings=limits, under_load=under_load(device))
        for wants in [OWN.__contains__] if options.autotune else passes:
            measure(device, options.dry_run, wants, rows, limits, note)
        if options.autotune:
            note(choices=chosen_tiles())


def _note(path: Path, part: str, **facts: Any) -> None:
    update(path, part, facts)


def key(name: str, size: dict[str, Any]) -> tuple[Any, ...]:
    return (name, *(size[number] for number in ("rows", "d", "r", "p")))


def measure(
    device: torch.device, dry: bool, wants: Wants, rows: dict[Any, dict[str, Any]], limits: dict[str, float], note: Note
) -> None:
    """Time the cases with the wanted providers; one row has all providers of a case."""
    for case in all_cases(dry, device):
        found = rows.get(key(case.name, case.size), row_of(case, limits))
        for provider in filter(wants, case.runs):
            if provider in found["ms"]:
                continue
            if seconds_left() < 5:
                note(left_out=f"from {case.name} {case.size} {provider} on")
                return
            found["ms"][provider] = measure_one(case, provider, device)
            print(f"{case.name} {case.size} {provider}: {found['ms'][provider]}", flush=True)
            rows[key(case.name, case.size)] = found
            note(rows=list(rows.values()))
            go_on_after(found["ms"][provider].get("error", ""))


def all_cases(dry: bool, device: torch.device) -> Iterator[Case]:
    """The middle size first, then its neighbours, then other ranks; torch.compile only for rank 16."""
    rows, widths, ranks = (64, (32,), (8,)) if dry else (8192, (4096, 2048, 8192), (16, 64, 8))
    for rank, width, p in product(ranks, widths, (0.1, 0.0)):
        size, compiles = {"rows": rows, "d": width, "r": rank, "p": p}, rank == ranks[0]
        s = Shapes(rows, width, rank, device)
        yield from lora_cases(s, size, compiles)
        yield linear_case(s, size, compiles, "trainable")
        if p == 0.0:
            yield linear_case(Shapes(rows, width, rank, device, trains=False), size, compiles, "frozen")
            yield score_case(s, size)
        elif compiles:
            yield from rowwise_cases(s, size)
            single = Shapes(rows, width, rank, device, adapter=torch.float32)
            yield from lora_cases(single, size, False, "lora in float32")


def row_of(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    moving = case.least.get("least_bytes", 0) / limits["copy_GB_s"] / 1e6
    computing = case.least.get("least_flops", 0) / limits["bf16_TFLOP_s"] / 1e9
    return {"case": case.name, **case.size, "floor_ms": max(moving, computing), **case.least, "ms": {}}


def measure_one(case: Case, provider: str, device: torch.device) -> dict[str, Any]:
    if provider == "compile":
        torch._dynamo.reset()  # else a graph for any size takes the place of one for this size
    run, before = case.runs[provider], partial(case.prepare, provider)
    try:
        found: dict[str, Any] = median_ms(run, device, before)
    except Exception as error:
        return {"error": reason(error)}
    if device.type == "cuda" and provider != "compile":
        try:
            found["device_p50"] = device_ms(run, device, before)
        except Exception as error:
            found["device_error"] = reason(error)
    return found


def chosen_tiles() -> dict[str, Any]:
    """What tuning has found, as it lies in its files."""
    return {path.name: json.loads(path.read_text()) for path in tuning.folder(None).glob("*.json")}


if __name__ == "__main__":
    main()
