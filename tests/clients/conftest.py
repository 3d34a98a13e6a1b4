"""For the tests of other people's programs: torchvision without its compiled ops, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

try:
    import torchvision
except RuntimeError:
    # The registry's torchvision is compiled for a torch with CUDA: with another, its ops are not registered, and it
    # registers shapes for two of them all the same. Nothing here calls them; timm and transformers import the rest.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

from side_by_side import Compared

LINES: list[Compared] = []


@pytest.fixture
def table() -> list[Compared]:
    """What the tests add is printed at the end."""
    return LINES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not LINES:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ours and stock PEFT, side by side")
    write("loss, gradients of the first step, weights: largest relative difference; retained: bytes of the last step")
    head = "client", "loss", "gradient", "weights", "tensors", "retained, stock", "bound", "stock, frozen", "ours"
    write("{:28} {:>8} {:>8} {:>8} {:>8} {:>16} {:>18} {:>14} {:>18}".format(*head))
    for line in LINES:
        write(
            f"{line.client:28} {line.loss:8.1e} {line.gradient:8.1e} {line.weight:8.1e} {line.files:8} "
            f"{line.stock:16,} {line.bound:11,} {line.bound / line.stock:5.2f}x "
            f"{line.stock_frozen:14,} {line.frozen:11,} {line.frozen / max(line.stock_frozen, 1):5.2f}x"
        )
