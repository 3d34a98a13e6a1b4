"""Are the kernels right on this GPU? Against float64, the CPU kernels with the same seed, and a second run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from machine import arguments, describe, device_of, write
from torch import Tensor

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ``|result - truth| / |truth|`` over a whole tensor."""
Op = Callable[..., Tensor]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def state() -> Tensor:
    return torch.randint(-(2**62), 2**62, (2,))


def cases(small: bool) -> Iterator[tuple[str, Op, list[Tensor], dict[str, Any]]]:
    """A name, the op, tensors that all want a gradient, and further arguments."""
    sizes = [(130, 96, 80, 5)] if small else [(130, 96, 80, 5), (1000, 1030, 770, 17), (4096, 2048, 2048, 16)]
    adapters = [(torch.bfloat16, torch.float32), *((dtype, dtype) for dtype in LIMIT)]
    for (rows, d_in, d_out, rank), (dtype, adapter), p in product(sizes, adapters, (0.0, 0.1)):
        x, base = normal(rows, d_in, dtype=dtype), normal(rows, d_out, dtype=dtype)
        A = normal(rank, d_in, dtype=adapter, scale=d_in**-0.5)
        B = normal(d_out, rank, dtype=adapter, scale=rank**-0.5)
        weight = normal(d_out, d_in, dtype=dtype, scale=d_in**-0.5)
        drop = {"dropout_p": p, "rng_state": state() if p else None}
        name = f"{rows}x{d_in}-{rank}-{d_out} {adapter} over {dtype} p{p}".replace("torch.", "")
        yield f"lora {name}", safe_kernels.lora, [x, base, A, B], {"scaling": 2.0, **drop}
        yield f"lora_linear {name}", _linear, [x, weight, A, B], {"scaling": 2.0, **drop}
        if adapter == dtype:
            row, gate = normal(d_in, dtype=dtype), normal(rows, d_in, dtype=dtype)
            yield f"rms_norm {name}", safe_kernels.rms_norm, [x, row], {"eps": 1e-6}
            yield f"layer_norm {name}", safe_kernels.layer_norm, [x, row, row.clone()], {"eps": 1e-6}
            for kind in ("silu", "gelu", "gelu_tanh", "relu"):
                yield f"gated {kind} {name}", safe_kernels.gated_activation, [gate, x], {"kind": kind, **drop}
                yield f"activation {kind} {name}", safe_kernels.activation, [gate], {"kind": kind, **drop}
            yield f"dropout {name}", safe_kernels.dropout, [x], {"dropout_p": 0.3, "rng_state": state()}


def _linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, **options: Any) -> Tensor:
    return safe_kernels.lora_linear(x, weight, None, A, B, **options)


def run(
    op: Op, tensors: Sequence[Tensor], options: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The output and all gradients, on `device`, in `dtype` or the tensors' own."""
    leaves = [tensor.to(device, dtype).detach().requires_grad_() for tensor in tensors]
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    out = op(*leaves, **moved)
    grad = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(tensors[0].dtype).to(device, out.dtype))]


def error(got: Tensor, truth: Tensor) -> float:
    """Relative to the truth's norm; nan is infinite."""
    difference = (got.double().cpu() - truth.double().cpu()).norm() / truth.double().norm().clamp(min=1e-30)
    return float(difference) if torch.isfinite(difference) else float("inf")


def check(op: Op, tensors: list[Tensor], options: dict[str, Any], device: torch.device) -> list[str]:
    """What is wrong; nothing if all is well."""
    truth = run(op, tensors, options, torch.device("cpu"), torch.float64)
    cpu, got, again = (run(op, tensors, options, where) for where in (torch.device("cpu"), device, device))
    limit = max(LIMIT[tensor.dtype] for tensor in tensors)
    wrong = []
    for index, results in enumerate(zip(truth, cpu, got, again, strict=True)):
        exact, same_seed, ours, repeated = results
        if error(ours, exact) > limit:
            wrong.append(f"result {index}: error {error(ours, exact):.1e} against float64, limit {limit:.0e}")
        if error(ours, same_seed) > 2 * limit:
            wrong.append(f"result {index}: differs from the CPU kernel's by {error(ours, same_seed):.1e}")
        if not torch.equal(ours, repeated):
            wrong.append(f"result {index}: other bits in a second run")
    return wrong


def check_mask(device: torch.device) -> list[str]:
    """The dropout of one seed, bit for bit as on a CPU."""
    x, seed = torch.ones(777, 1234), state()
    masks = [safe_kernels.dropout(x.to(where), 0.5, rng_state=seed.to(where)).cpu() for where in ("cpu", device)]
    return [] if torch.equal(*masks) else ["dropout's mask differs from the CPU's"]


def check_score(device: torch.device) -> list[str]:
    """1 - CKA of one adapter, here and on a CPU."""
    x, base = normal(512, 256, dtype=torch.float32), normal(512, 300, dtype=torch.float32)
    A, B = normal(8, 256, dtype=torch.float32, scale=0.06), normal(300, 8, dtype=torch.float32, scale=0.01)
    weight, scores = torch.arange(512) % 7 != 0, []
    for where in (torch.device("cpu"), device):
        blocks = RowBlocks(torch.tensor([0, 200, 450]).to(where), 128, weight.to(where))
        statistics = AdapterStatistics(torch.zeros(4, dtype=torch.float64, device=where), blocks)
        safe_kernels.lora(x.to(where), base.to(where), A.to(where), B.to(where), 2.0, statistics=statistics)
        scores.append(statistics.one_minus_cka())
    return [] if abs(scores[0] - scores[1]) <= 1e-4 * scores[0] else [f"1 - CKA: {scores[1]}, on a CPU {scores[0]}"]


def main() -> None:
    options = arguments(__doc__ or "")
    device = device_of(options)
    torch.manual_seed(0)
    with safe_kernels.autotune(options.autotune, cache=options.out.absolute().parent):
        found = {"dropout's mask": check_mask(device), "score": check_score(device)}
        for name, op, tensors, further in cases(options.small or options.dry_run):
            found[name] = check(op, tensors, further, device)
    wrong = {name: problems for name, problems in found.items() if problems}
    write(options, {"machine": describe(device), "checked": len(found), "wrong": wrong})
    for name, problems in wrong.items():
        print(f"WRONG {name}: {'; '.join(problems)}")
    print(f"{len(found) - len(wrong)} of {len(found)} checks passed on {device}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
