"""Flatness: how sharp the training loss is where a training ends, in the directions of its adapters.

The same model with the same attention in PyTorch's own operations is measured for every arm, all adapters thawed and
balanced, so that an arm cannot look flat because its factors have another scale or because fewer of them train.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evidence import arms
from evidence.results import finished, mean, missing, write
from evidence.tasks import Data, Task
from evidence.training import Training
from safe_peft import SafeConfig

ARMS: dict[str, Callable[[int], SafeConfig] | None] = {
    "nothing": None,
    "default": lambda seed: SafeConfig(seed=seed),
    "paper": lambda seed: SafeConfig.paper(seed=seed),
    "random": lambda seed: SafeConfig.paper(score="random", seed=seed),
}
ROWS, ITERATIONS, RADIUS = 64, 12, 0.05


def run(task: Task, seeds: Sequence[int], folder: Path, _forks: Path, chosen: Sequence[str]) -> Iterator[str]:
    """Run what is missing, and yield a line per finished run.

    Args:
        task: the sizes.
        seeds: the seeds.
        folder: for the JSON files.
        chosen: the arms; all if there are none.
    """
    data = Data(task)
    for seed, arm, path in missing("flatness", seeds, chosen or ARMS, folder):
        config, training = ARMS[arm], Training(task, data, seed)
        if config is None:
            costs: dict[str, Any] = {"seconds": training.run(task.steps), "bytes_end": 1.0, "bytes": 1.0, "flops": 1.0}
            training.binding.detach()
        else:
            costs = arms.freeze(training, config(seed))
        write(path, {"seed": seed, "arm": arm, **costs, **training.test(), **sharpness(training)})
        yield f"{path.name} {path.read_text()}"


def sharpness(training: Training, rows: int = ROWS) -> dict[str, float]:
    """Return how sharp the mean loss of the first training rows is, without dropout.

    Returns:
        train_loss: the loss itself.
        eigenvalue: the largest eigenvalue of the Hessian (Lanczos).
        sam: how much the loss rises after a step of length RADIUS along the gradient (arXiv 2010.01412).
    """
    model = training.model.eval()
    model.set_attn_implementation("eager")  # the fused attention has no second derivative on a CPU
    balance(model)
    factors = [p.requires_grad_() for name, p in training.named.items() if "lora_" in name]
    examples = sorted(training.data.train[:rows], key=lambda example: len(example[0]))
    batches = [training.data.batch(examples[begin : begin + 32]) for begin in range(0, rows, 32)]

    def loss() -> Tensor:
        return torch.stack([model(**batch).loss for batch in batches]).mean()

    here = loss()
    gradient = torch.autograd.grad(here, factors, create_graph=True)

    def parts(vector: Tensor) -> list[Tensor]:
        pieces = vector.split([p.numel() for p in factors])
        return [piece.view_as(p) for piece, p in zip(pieces, factors, strict=True)]

    def times_hessian(vector: Tensor) -> Tensor:
        return flat(torch.autograd.grad(gradient, factors, parts(vector), retain_graph=True))

    direction = flat(gradient).detach()
    eigenvalue = largest_eigenvalue(times_hessian, direction)
    with torch.no_grad():
        before = [p.clone() for p in factors]
        for factor, part in zip(factors, parts(RADIUS * direction / direction.norm()), strict=True):
            factor += part
        rise = loss().item() - here.item()
        for factor, value in zip(factors, before, strict=True):
            factor.copy_(value)
    return {"train_loss": here.item(), "eigenvalue": eigenvalue, "sam": rise}


def balance(model: nn.Module) -> None:
    """Give both factors of every adapter the same singular values; their product stays."""
    for layer in model.modules():
        if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
            continue
        for name, down in layer.lora_A.items():
            up = layer.lora_B[name]
            left, values, right = torch.linalg.svd(up.weight.detach() @ down.weight.detach(), full_matrices=False)
            root = values[: down.out_features].sqrt()
            up.weight.data.copy_(left[:, : len(root)] * root)
            down.weight.data.copy_(root[:, None] * right[: len(root)])


def largest_eigenvalue(times: Callable[[Tensor], Tensor], start: Tensor, iterations: int = ITERATIONS) -> float:
    """Return the largest eigenvalue of a symmetric matrix by Lanczos iterations with full orthogonalisation."""
    basis: list[Tensor] = []
    products: list[Tensor] = []
    vector = start
    for _ in range(iterations):
        for _twice in range(2):
            for other in basis:
                vector = vector - (vector @ other) * other
        if vector.norm() < 1e-8 * start.norm():
            break
        basis.append(vector / vector.norm())
        vector = times(basis[-1])
        products.append(vector)
    small = torch.stack(basis) @ torch.stack(products).T
    return torch.linalg.eigvalsh((small + small.T) / 2)[-1].item()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def summary(folder: Path) -> list[str]:
    """Return the table of docs/evidence.md: means over seeds, and standard errors."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in finished("flatness", folder):
        found[one["arm"]].append(one)
    base = {one["seed"]: one for one in found.get("nothing", [])}
    columns = "bytes, end | bytes, mean | FLOPs | accuracy | difference, points | train loss | eigenvalue | SAM"
    lines = [f"| arm | {columns} | seeds |", "|---|---|---|---|---|---|---|---|---|---|"]
    for arm in (arm for arm in ARMS if arm in found):
        runs = found[arm]
        cells = [mean([one[name] for one in runs], ".2f") for name in ("bytes_end", "bytes", "flops")]
        cells.append(mean([one["accuracy"] for one in runs], ".4f"))
        paired = [100 * (one["accuracy"] - base[one["seed"]]["accuracy"]) for one in runs if one["seed"] in base]
        cells.append(mean(paired, "+.2f") if paired and arm != "nothing" else "")
        cells += [mean([one[name] for one in runs], form) for name, form in
                  (("train_loss", ".3f"), ("eigenvalue", ".1f"), ("sam", ".4f"))]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(runs)} |")
    return lines
