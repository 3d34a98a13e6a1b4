"""One call on a GPU, compared with float64, with the CPU kernels on the same seed, and with itself."""

from __future__ import annotations

import torch
from gpu_cases import Case
from torch import Tensor

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ``|result - truth| / |truth|`` over a whole tensor."""
CPU = torch.device("cpu")


def run(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradients, on `device`, in `dtype` or the inputs' own."""
    call, leaves = case.place(device, dtype)
    out = call()
    grad = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(case.inputs[0].dtype).to(device, out.dtype))]


def error(got: Tensor, truth: Tensor) -> float:
    """Relative to the truth's norm; nan is infinite."""
    difference = (got.double().cpu() - truth.double().cpu()).norm() / truth.double().norm().clamp(min=1e-30)
    return float(difference) if torch.isfinite(difference) else float("inf")


def problems(case: Case, device: torch.device) -> list[str]:
    """What is wrong; nothing if all is well."""
    truth = run(case, CPU, torch.float64)
    cpu, got, again = (run(case, where) for where in (CPU, device, device))
    limit = max(LIMIT[normal.dtype] for normal in case.inputs)
    wrong = []
    for index, (exact, same_seed, ours, repeated) in enumerate(zip(truth, cpu, got, again, strict=True)):
        if error(ours, exact) > limit:
            wrong.append(f"result {index}: error {error(ours, exact):.1e} against float64, limit {limit:.0e}")
        if error(ours, same_seed) > 2 * limit:
            wrong.append(f"result {index}: differs from the CPU kernel's by {error(ours, same_seed):.1e}")
        if not torch.equal(ours, repeated):
            wrong.append(f"result {index}: other bits in a second run")
    return wrong
