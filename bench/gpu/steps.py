"""Training steps of Llama shapes with random weights: time and peak memory, with PEFT, Liger and torch.compile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice, product
from typing import Any, NamedTuple

import torch

import safe_kernels

from .llama import LAYOUTS, LORA, LOSS, SHAPES, TOKENS, Step, freeze, liger, make_model
from .machine import Run, arguments, device_of, median_ms
from .results import go_on_after, reason, recording, seconds_left, so_far, update

FURTHER = (
    "liger",
    "compile blocks",
    "safe, compile blocks",
    "safe, tuned",
    "peft, Liger's loss",
    "safe, Liger's loss",
    "peft, float32",
    "safe, float32",
)


class Case(NamedTuple):
    """A step: the size, the provider, and the frozen adapters."""

    size: str
    provider: str
    frozen: str


def cases(sizes: tuple[str, ...]) -> Iterator[Case]:
    """Yield the cases of the targets first. Compiling a whole model takes minutes, so it is last."""
    first = sizes[0]
    for size in sizes:
        yield from (Case(size, provider, "nothing") for provider in ("peft", "safe", "safe, scored"))
        yield from (Case(size, provider, "lower half") for provider in ("peft", "safe"))
        yield Case(size, "peft, chunked loss", "nothing")
        yield from (Case(size, "safe, chunked loss", frozen) for frozen in ("nothing", "lower half"))
        if size == first:
            yield from (Case(size, provider, "nothing") for provider in FURTHER)
    for size, layout, provider in product(sizes, tuple(LAYOUTS)[2:], ("peft", "safe")):
        yield Case(size, provider, layout)
    for layout, provider in product(tuple(LAYOUTS)[1:], ("liger", "compile blocks")):
        yield Case(first, provider, layout)
    for size, provider in product(sizes[1:], ("liger", "compile blocks")):
        yield Case(size, provider, "nothing")
    yield Case(first, "compile", "nothing")


def peak_bytes(run: Run, device: torch.device) -> int:
    if device.type == "cpu":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def prepare(case: Case, device: torch.device, undo: ExitStack) -> Step:
    """A model, changed as the provider changes one, and its step."""
    import safe_peft

    shape, (provider, _, further) = SHAPES[case.size], case.provider.partition(", ")
    model: Any = make_model(shape, device, single=further == "float32")
    freeze(model, case.frozen)
    if provider == "liger" or further == "Liger's loss":
        undo.enter_context(liger(model, loss_alone=provider != "liger"))
    if further == "tuned":
        undo.enter_context(safe_kernels.autotune())
    if provider == "safe" and further != "scored":
        safe_peft.bind(model)
    backend = "aot_eager" if device.type == "cpu" else "inductor"
    if "compile blocks" in (provider, further):
        for block in model.get_submodule("base_model.model.model.layers"):
            block.compile(backend=backend, dynamic=False)
    if provider == "compile":
        model = torch.compile(model, backend=backend, dynamic=False)
    tokens = torch.randint(shape["vocab_size"], TOKENS[case.size], device=device)
    return Step(model, tokens, scored=further == "scored", chunked=further == "chunked loss")


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Return time and memory, or the reason of a failure."""
    try:
        with ExitStack() as undo:
            step = prepare(case, device, undo)
            held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            step()
            peak = peak_bytes(step, device)
            found = {"ms": median_ms(step, device, budget_ms=1500), "peak_bytes": peak, "held_bytes": held}
            if step.freezer is not None:
                found["scorings"] = len(step.freezer.ledger.scorings)
            return found
    except Exception as error:
        return {"error": reason(error)}


def clean_up(device: torch.device) -> None:
    """After the model's last user has gone."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    options = arguments(__doc__ or "")
    note = partial(update, options.out, options.part)
    rows: list[dict[str, Any]] = so_far(options.out, options.part).get("rows", [])
    with recording(options.out, options.part):
        device = device_of(options)
        sizes = ("tiny",) if options.dry_run else ("1B", "8B")
        used = {size: {**SHAPES[size], "tokens": TOKENS[size]} for size in sizes}
        note({"models": used, "lora": LORA, "loss": LOSS, "attention": "sdpa", "optimizer": "AdamW"})
        for case in islice(cases(sizes), len(rows), None):
            if seconds_left() < 10:
                note({"left_out": f"from {' '.join(case)} on"})
                break
            rows.append({**case._asdict(), **measure(case, device)})
            print(rows[-1], flush=True)
            note({"rows": rows})
            go_on_after(rows[-1].get("error", ""))
            clean_up(device)


if __name__ == "__main__":
    main()
