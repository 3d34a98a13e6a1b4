"""Runs a case over stock PEFT and over a bound model and says in what they differ."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from case import Case
from program import Outcome, play
from torch import Tensor

TOLERANCE = {"fp32": 2e-5, "fp64": 1e-5}  # transformers' RMSNorms compute in fp32 whatever the weights are
NOISE = {"fp32": 1e-6, "fp64": 1e-6, "bf16": 2e-2, "fp16": 3e-3, "autocast": 2e-2}
"""Of a case's largest gradient: below it a gradient is made of rounding."""
KINKED = {"t5", "opt"}
"""Families with ReLUs: in 16 bits rounding switches some of them, and moves single gradients, on both sides.

A ReLU that one side alone switches moves the row of its unit in the layer before, and the column in the layer after.
"""
SMALL_LOSS = 0.01
"""A loss is a mean of numbers of both signs, and may be nearer to zero than any of them."""
WRITING = {f"{what}{how}" for what in ("", "input ") for how in ("in place", "no grad", "data")}
SWITCHED = 0.02
"""Of the units of a layer: so many may be switched on one side alone, which is at least one unit."""


def run(case: Case) -> list[str]:
    """Say all in which a bound model differs from stock PEFT; nothing if all is well.

    Args:
        case: which program.

    Example:
        >>> run(Case(family="llama", trains="top"))
        []
    """
    ours = play(case, bound=True, recompute=case.recompute)
    wrong = _unlike_stock(case, case, ours)
    if wrong and case.calls == "disabled" and case.checkpointing == "reentrant":
        # There stock PEFT is wrong itself: it runs a forward without adapters again with them.
        wrong = _unlike_stock(case, replace(case, checkpointing="none", input_grads=True, cache="off"), ours)
    if wrong and _hides_a_write(case):
        wrong = [difference for difference in wrong if not difference.startswith("gradient: ")]
    if case.recompute and not case.compiled:
        wrong += _to_the_bit(case, play(case, bound=True), ours)
    return wrong


def _unlike_stock(case: Case, program: Case, ours: Outcome) -> list[str]:
    stock = play(program, bound=False)
    wrong = _errors(case, stock, ours)
    if stock.error is None and ours.error is None:
        if not case.draws:
            wrong += _values(program, stock, ours)
        if stock.bytes is not None and ours.bytes is not None and ours.bytes > stock.bytes:
            wrong.append(f"bytes: stock retains {stock.bytes}, ours {ours.bytes}")
    return wrong


def _hides_a_write(case: Case) -> bool:
    """Whether stock PEFT's gradients are made of what was written over: it refuses the same write where it sees it.

    It sees none through .data, nor one in a checkpointed part, which reads what was written over when it runs again.
    """
    seen = {name: getattr(case, name).replace("data", "no grad") for name in ("hook", "writes")}
    seen["checkpointing"] = case.checkpointing.replace("non-reentrant", "none")
    visible = replace(case, **seen)
    return visible != case and "modified by an inplace operation" in str(play(visible, bound=False).error)


def _errors(case: Case, stock: Outcome, ours: Outcome) -> list[str]:
    if ours.error is None:
        fine = stock.error is None or _is_spared(case, str(stock.error))
        return [] if fine else [f"error: stock raises {_told(stock.error)}, ours nothing"]
    if stock.error is None:
        return [] if _helps(case, str(ours.error)) else [f"error: stock none, ours {_told(ours.error)}"]
    if type(stock.error) is not type(ours.error):
        return [f"error: stock raises {_told(stock.error)}, ours {_told(ours.error)}"]
    return []


def _is_spared(case: Case, said: str) -> bool:
    """Whether stock PEFT's error is about something that ours does not need.

    What was written over; the leaf that `enable_input_require_grads` makes; the graph down to it, which a forward
    with adapters disabled builds, and which checkpointing cannot build again once they are enabled.
    """
    leaf = case.input_grads or case.checkpointing != "none"
    return (
        "modified by an inplace operation" in said
        or (leaf and "a leaf Variable that requires grad is being used in an in-place operation" in said)
        or (leaf and case.calls == "disabled" and "Recomputed values for the following tensors" in said)
    )


def _helps(case: Case, said: str) -> bool:
    """Whether an error of ours is one that is allowed: about a write, naming the part and the way out.

    Or about a block that was changed before it ran again, by ours or by activation checkpointing.
    """
    if case.when == "between":
        taken = case.recompute and case.change.startswith(("prune", "parametrize"))
        if taken and "was replaced between forward and backward" in said:
            return True
        if case.checkpointing != "none" and re.search("Recomputed values for|number of tensors was saved", said):
            return True
    writes = case.writes != "nothing" or case.hook in WRITING
    between = case.when == "between" and case.change.startswith(("half and back", "norm ", "parametrize"))
    about = re.search(r"in.?place|written|overw|changed between forward and backward", said)
    return (writes or between) and bool(about and re.search(r"safe_peft|bind\(|parts|binding\.recompute", said))


def _told(error: Exception | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _to_the_bit(case: Case, plain: Outcome, again: Outcome) -> list[str]:
    if plain.error is not None or again.error is not None:
        same = type(plain.error) is type(again.error) or _helps(case, str(again.error))
        same |= again.error is None and _is_spared(case, str(plain.error))
        return [] if same else [f"recompute: {_told(again.error)} where without it is {_told(plain.error)}"]
    pairs = [*zip(plain.losses, again.losses, strict=True)]
    wrong = [f"recompute: loss {i} differs" for i, (a, b) in enumerate(pairs) if not _equal(a, b)]
    if set(plain.gradients) != set(again.gradients):
        return [*wrong, f"recompute: gradients of {sorted(set(plain.gradients) ^ set(again.gradients))[:3]}"]
    off = [name for name, grad in plain.gradients.items() if not _equal(grad, again.gradients[name])]
    return [*wrong, f"recompute: not to the bit: {len(off)} gradients, {off[0]}"] if off else wrong


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def _values(case: Case, stock: Outcome, ours: Outcome) -> list[str]:
    """Losses, gradients and events."""
    wrong = [] if stock.events == ours.events else [f"events: {_unlike(stock.events, ours.events)}"]
    missing = sorted(set(stock.gradients) - set(ours.gradients))
    more = sorted(set(ours.gradients) - set(stock.gradients))
    if missing:
        wrong.append(f"missing: no gradient of {len(missing)}, {missing[0]}")
    if more:
        wrong.append(f"more: gradient of {len(more)} that stock has not, {more[0]}")
    exact = play(case, bound=False, dtype=torch.float64) if case.precision not in TOLERANCE else None
    if exact is not None and (exact.error is not None or set(exact.gradients) != set(stock.gradients)):
        return wrong  # nothing to compare with
    wrong += _losses(case, stock, ours, exact)
    return wrong + _gradients(case, stock, ours, exact)


def _gradients(case: Case, stock: Outcome, ours: Outcome, exact: Outcome | None) -> list[str]:
    """Those that both have."""
    wrong, off = [], {}
    largest = max((_peak(grad) for grad in stock.gradients.values()), default=0.0)
    worst_of_stock = 0.0 if exact is None else _worst(stock, exact)  # rounding is by chance small in single ones
    kinked = exact is not None and (case.family in KINKED or case.has_relu)
    for name in sorted(stock.gradients.keys() & ours.gradients.keys()):
        a, b = stock.gradients[name], ours.gradients[name]
        reference = None if exact is None else exact.gradients[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            wrong.append(f"kind: {name} is {a.dtype} {tuple(a.shape)}, ours {b.dtype} {tuple(b.shape)}")
        else:
            distance = _off_elsewhere(reference, b) if kinked else _off(a, b, reference)
            if distance > _allowed(case, a, reference, largest) + 2.0 * worst_of_stock * _peak(a):
                off[name] = distance / max(_peak(a), 1e-30)
    if off and exact is None:  # a gradient that is zero but for rounding, such as that of a key's bias
        truth = play(case, bound=False, dtype=torch.float64).gradients
        known = off.keys() & truth.keys()  # not those of a program that float64 breaks
        far = {name: 4.0 * _off(truth[name], stock.gradients[name], None) for name in known}
        off = {n: v for n, v in off.items() if n not in far or _off(truth[n], ours.gradients[n], None) > far[n]}
    if off:
        worst = max(off, key=lambda name: off[name])
        wrong.append(f"gradient: {len(off)} of {len(stock.gradients)} are off, by {off[worst]:.1e} of {worst}")
    return wrong


def _worst(stock: Outcome, exact: Outcome) -> float:
    """The largest error of a gradient of stock's, as a share of its largest element."""
    shares = (_off(exact.gradients[n], grad, None) / max(_peak(grad), 1e-30) for n, grad in stock.gradients.items())
    return max(shares, default=0.0)


def _unlike(stock: list[str], ours: list[str]) -> str:
    for index, (a, b) in enumerate(zip(stock, ours, strict=False)):
        if a != b:
            return f"{index} is {a!r}, ours {b!r}"
    return f"{len(stock)}, ours {len(ours)}: {(stock + ours)[min(len(stock), len(ours))]!r}"


def _losses(case: Case, stock: Outcome, ours: Outcome, exact: Outcome | None) -> list[str]:
    wrong = []
    for index, (a, b) in enumerate(zip(stock.losses, ours.losses, strict=True)):
        reference = None if exact is None else exact.losses[index]
        if _off(a, b, reference) > _allowed(case, a, reference, max(_peak(a), SMALL_LOSS)):
            wrong.append(f"loss: {index} is {a.item():.7g}, ours {b.item():.7g}")
    return wrong


def _off(a: Tensor, b: Tensor, exact: Tensor | None) -> float:
    """How far ours is from stock, or from the exact value."""
    if a.shape != b.shape:
        return float("inf")
    base = a.double() if exact is None else exact.double()
    if bool((base.isnan() != b.isnan()).any()):
        return float("nan") if exact is not None and bool(a.isnan().any()) else float("inf")
    return _peak(torch.nan_to_num(base) - torch.nan_to_num(b.double()))


def _off_elsewhere(exact: Tensor, b: Tensor) -> float:
    """How far ours is from the exact gradient of a matrix, but for the units that rounding may have switched."""
    if exact.ndim != 2 or exact.shape != b.shape or bool((exact.isnan() != b.isnan()).any()):
        return _off(b, b, exact)
    error = torch.nan_to_num(exact.double() - b.double()).abs()
    return min(_without_the_worst(error.amax(1)), _without_the_worst(error.amax(0)))


def _without_the_worst(of_units: Tensor) -> float:
    kept = len(of_units) - max(1, int(SWITCHED * len(of_units)))
    return float(of_units.sort().values[kept - 1]) if kept > 0 else 0.0


def _allowed(case: Case, a: Tensor, exact: Tensor | None, largest: float) -> float:
    noise = NOISE[case.precision] * largest * (10 if a.numel() == 1 else 1)  # a sum over all that the model computes
    return noise + (TOLERANCE[case.precision] * _peak(a) if exact is None else 2.0 * _off(exact, a, None))


def _peak(tensor: Tensor) -> float:
    return float(torch.nan_to_num(tensor.detach().double()).abs().max()) if tensor.numel() else 0.0
