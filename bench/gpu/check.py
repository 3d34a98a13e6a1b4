"""Are the kernels right on this GPU? Against float64, the CPU kernels with the same seed, and a second run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

import safe_kernels

from .check_cases import Case, large_cases, small_cases
from .check_whole import whole_checks
from .machine import arguments, device_of
from .results import go_on_after, reason, recording, seconds_left, so_far, update

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ``|result - truth| / |truth|`` over a whole tensor."""
CPU = torch.device("cpu")


def run(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradients, on `device`, in `dtype` or the tensors' own."""
    call, leaves = case.place(device, dtype)
    out = call()
    grad = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(case.tensors[0].dtype).to(device, out.dtype))]


def error(got: Tensor, truth: Tensor) -> float:
    """Relative to the truth's norm; nan is infinite."""
    difference = (got.double().cpu() - truth.double().cpu()).norm() / truth.double().norm().clamp(min=1e-30)
    return float(difference) if torch.isfinite(difference) else float("inf")


def check(case: Case, device: torch.device) -> list[str]:
    """What is wrong; nothing if all is well."""
    truth = run(case, CPU, torch.float64)
    cpu, got, again = (run(case, where) for where in (CPU, device, device))
    limit = max(LIMIT[tensor.dtype] for tensor in case.tensors)
    wrong = []
    for index, (exact, same_seed, ours, repeated) in enumerate(zip(truth, cpu, got, again, strict=True)):
        if error(ours, exact) > limit:
            wrong.append(f"result {index}: error {error(ours, exact):.1e} against float64, limit {limit:.0e}")
        if error(ours, same_seed) > 2 * limit:
            wrong.append(f"result {index}: differs from the CPU kernel's by {error(ours, same_seed):.1e}")
        if not torch.equal(ours, repeated):
            wrong.append(f"result {index}: other bits in a second run")
    return wrong


def checks(large: bool, dry: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    if not large:
        yield from whole_checks(device)
    for case in large_cases(dry) if large else small_cases():
        yield case.name, partial(check, case, device)
    for index in range(1, torch.cuda.device_count()) if device.type == "cuda" and not large else ():
        second = torch.device("cuda", index)
        yield from ((f"{case.name} on {second}", partial(check, case, second)) for case in small_cases())


def outcome(verify: Callable[[], list[str]]) -> list[str]:
    try:
        return verify()
    except Exception as problem:
        return [reason(problem)]


def main() -> None:
    options = arguments(__doc__ or "")
    before = so_far(options.out, options.part)
    wrong: dict[str, list[str]] = before.get("wrong", {})
    checked: int = before.get("checked", 0)
    with recording(options.out, options.part), safe_kernels.autotune(options.autotune):
        device = device_of(options)
        torch.manual_seed(0)
        for name, verify in islice(checks(options.large, options.dry_run, device), checked, None):
            if seconds_left() < 3:
                update(options.out, options.part, {"left_out": f"from {name} on"})
                break
            checked += 1
            if problems := outcome(verify):
                wrong[name] = problems
                print(f"WRONG {name}: {'; '.join(problems)}", flush=True)
            update(options.out, options.part, {"checked": checked, "wrong": wrong})
            go_on_after(" ".join(problems))
    print(f"{checked - len(wrong)} of {checked} checks passed on {device}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
