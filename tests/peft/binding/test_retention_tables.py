"""The table of what is retained says what is measured: docs/retention.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from blocks import adapter_layers
from families import LENGTH, ROWS, D, F, family
from pages import table
from torch import Tensor, nn

import safe_kernels
from safe_kernels.retention import measure
from safe_peft import bind

TOKENS = ROWS * LENGTH
STATES = ("something trains", "frozen, the gradient passes", "nothing below it trains")
READERS = 3
INPUT, WIDE, ROW, RANK, RANDOM, NORM = 4 * TOKENS * D, 4 * TOKENS * F, 4 * TOKENS, 4 * TOKENS * 4, 16, 4 * F
"""Bytes in fp32: d or f elements per token, a number per row, r = 4 numbers per row, a random state, DoRA's norm."""
BITS = TOKENS
"""r = 4 bits per token, in whole bytes."""

WORDS: dict[str, list[int] | None] = {
    "its input, once for all layers that read it; with dropout 16 bytes": [INPUT, INPUT + READERS * RANDOM],
    "nothing; with dropout left on 16 bytes": [0, READERS * RANDOM],
    "as `lora`, and one norm per output feature of the layer": [
        INPUT + READERS * NORM,
        INPUT + READERS * (NORM + RANDOM),
    ],
    "one norm per output feature of the layer; with dropout left on 16 bytes more": [
        READERS * NORM,
        READERS * (NORM + RANDOM),
    ],
    "one bit per hidden unit; with dropout left on 16 bytes more": [READERS * BITS, READERS * (BITS + RANDOM)],
    "the pre-activation (r numbers per row); with dropout left on 16 bytes more": [
        READERS * RANK,
        READERS * (RANK + RANDOM),
    ],
    "only what that activation retains: its input is recomputed": [0],
    "nothing": [0],
    "x A' (r numbers per row); with dropout 16 bytes more": [READERS * RANK, READERS * (RANK + RANDOM)],
    "once a reader retains the output: that output, and 4 bytes per row": [INPUT + ROW, INPUT + ROW],
    "the input, and 4 bytes per row (`layer_norm` 8)": [INPUT + ROW, INPUT + 2 * ROW],
    "gate and up (2f)": [2 * WIDE],
    "the pre-activation (f)": [WIDE],
    "its output (f), as PyTorch does": [WIDE],
    "16 bytes": [RANDOM],
    "cos and sin, once for all layers (r numbers per token each)": [2 * RANK],
    "its input (d)": [INPUT],
    "the gradient of its input (d)": [INPUT],
    "no graph node": None,
}
"""What a cell means, for each of its row's measurements; None where there is no graph."""


def leaf(width: int, state: str) -> Tensor:
    return torch.randn(TOKENS, width, requires_grad=state != STATES[2])


def weight(*shape: int, trains: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) + 0.5, requires_grad=trains)


def retained(forward: Callable[[], Tensor], *given: Tensor | tuple[Tensor, ...]) -> int | None:
    """Bytes, or None without a graph."""
    found = measure(forward, exclude=given)
    return found.bytes if found.output.requires_grad else None


def lora(state: str, trains_A: bool = True) -> list[int | None]:
    trains = state == STATES[0]
    adapters = [(weight(4, D, trains=trains and trains_A), weight(F, 4, trains=trains)) for _ in range(READERS)]
    x, base = leaf(D, state), torch.randn(TOKENS, F)

    def forward(p: float) -> Tensor:
        return torch.stack([safe_kernels.lora(x, base, A, B, 2.0, dropout_p=p) for A, B in adapters])

    return [retained(lambda: forward(0.0), *adapters), retained(lambda: forward(0.1), *adapters)]


def lora_with_a_frozen_A(state: str) -> list[int | None]:
    return lora(state, trains_A=False)


def lora_behind_an_activation(state: str) -> list[int | None]:
    """In addition to what the activation alone retains."""
    trains = state == STATES[0]
    A, B = weight(4, F, trains=trains), weight(D, 4, trains=trains)
    x, base = leaf(F, state), torch.randn(TOKENS, D)
    alone = retained(lambda: safe_kernels.activation(x, "gelu"))
    both = retained(lambda: safe_kernels.lora(safe_kernels.activation(x, "gelu"), base, A, B, 2.0), A, B)
    return [None if both is None or alone is None else both - alone]


def dora(state: str) -> list[int | None]:
    trains, x = state == STATES[0], leaf(D, state)
    layers = [
        (weight(F, D), weight(4, D, trains=trains), weight(F, 4, trains=trains), weight(F, trains=trains))
        for _ in range(READERS)
    ]

    def forward(p: float) -> Tensor:
        return torch.stack([safe_kernels.dora(x, W, None, A, B, m, 2.0, dropout_p=p) for W, A, B, m in layers])

    return [retained(lambda: forward(0.0), *layers), retained(lambda: forward(0.1), *layers)]


def lora_conv(state: str) -> list[int | None]:
    trains = state == STATES[0]
    x = torch.randn(1, D, TOKENS, requires_grad=state != STATES[2])
    layers = [(weight(F, D, 3), weight(4, D, 3, trains=trains), weight(F, 4, 1, trains=trains)) for _ in range(READERS)]

    def forward(p: float) -> Tensor:
        steps = (1,), (1,), (1,)
        outs = [safe_kernels.lora_conv(x, W, None, A, B, 2.0, *steps, dropout_p=p) for W, A, B in layers]
        return torch.stack(outs)

    return [retained(lambda: forward(0.0), *layers), retained(lambda: forward(0.1), *layers)]


def bottleneck(state: str, kind: str = "relu") -> list[int | None]:
    trains, x, residual = state == STATES[0], leaf(D, state), torch.randn(TOKENS, F)
    adapters = [[weight(*shape, trains=trains) for shape in ((4, D), (4,), (F, 4), (F,))] for _ in range(READERS)]

    def forward(p: float) -> Tensor:
        return torch.stack([safe_kernels.bottleneck(x, residual, *one, kind, 1.0, dropout_p=p) for one in adapters])

    given = [tuple(one) for one in adapters]
    return [retained(lambda: forward(0.0), *given), retained(lambda: forward(0.1), *given)]


def norms(state: str, trains: bool = False, retain_output: bool = True) -> list[int | None]:
    """Before a layer whose adapter trains in the first state, and is frozen in the others."""
    x, w, b = leaf(D, state), weight(D, trains=trains), weight(D)
    A, B = (weight(*shape, trains=state == STATES[0] and not trains) for shape in ((4, D), (F, 4)))
    base, parameters = torch.randn(TOKENS, F), (w, b, A, B)

    def read(y: Tensor) -> Tensor:
        return safe_kernels.lora(y, base, A, B, 2.0)

    return [
        retained(lambda: read(safe_kernels.rms_norm(x, w, 1e-5, retain_output=retain_output)), *parameters),
        retained(lambda: read(safe_kernels.layer_norm(x, w, b, 1e-5, retain_output=retain_output)), *parameters),
    ]


def norms_that_keep_their_input(state: str) -> list[int | None]:
    """A weight trains; or, in the other states, the binding has found it too small to divide by."""
    return norms(state, trains=state == STATES[0], retain_output=False)


def gated(state: str) -> list[int | None]:
    gate, up = leaf(F, state), leaf(F, state)
    return [retained(lambda: safe_kernels.gated_activation(gate, up, "silu"))]


def plain(state: str, kind: str = "gelu") -> list[int | None]:
    x = leaf(F, state)
    return [retained(lambda: safe_kernels.activation(x, kind))]


def dropout(state: str) -> list[int | None]:
    x = leaf(D, state)
    return [retained(lambda: safe_kernels.dropout(x, 0.1))]


def rotary(state: str) -> list[int | None]:
    x, angles = leaf(D, state).view(1, D // 4, TOKENS, 4), torch.randn(2, 1, TOKENS, 4)
    return [retained(lambda: torch.cat([safe_kernels.rotary(x, *angles) for _ in range(READERS)]))]


def last_layer(state: str) -> list[int | None]:
    x, head = leaf(D, state), weight(F, D)
    target = torch.arange(TOKENS) % F
    return [retained(lambda: safe_kernels.linear_cross_entropy(x, head, None, target), head)]


def frozen_block(state: str) -> list[int | None]:
    """What one more adds, above the lowest block that trains or below it."""
    sizes, below = [], state == STATES[2]
    for layers in (3, 4):
        model, batch = family("llama").model(layers), family("llama").batch()
        adapters = adapter_layers(model)
        one = len(adapters) // layers
        for layer in adapters[:-one] if below else adapters[one:]:
            layer.requires_grad_(False)
        inputs: list[Tensor] = []
        with bind(model) as binding:
            binding.recompute.update(binding.blocks)
            model.get_submodule(f"base_model.model.{binding.blocks[2]}").register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0])
            )
            found = measure(lambda model=model, batch=batch: model(**batch).loss, exclude=[model, *batch.values()])
        assert inputs[0].requires_grad != below
        sizes.append(found.bytes)
    return [None if below and sizes[0] == sizes[1] else sizes[1] - sizes[0]]


MEASURED: dict[str, Callable[[str], list[int | None]]] = {
    "`lora`": lora,
    "`lora` with a frozen lora_A (LoRA-FA)": lora_with_a_frozen_A,
    "`lora` behind an activation": lora_behind_an_activation,
    "`dora`": dora,
    "`lora_conv` (a convolution and its adapter)": lora_conv,
    "`bottleneck` (ReLU)": bottleneck,
    "`bottleneck` (GELU, SiLU)": partial(bottleneck, kind="gelu"),
    "`rms_norm`, `layer_norm`, weights frozen": norms,
    "the same, a weight trains, is zero, or is far smaller than its bias": norms_that_keep_their_input,
    "`gated_activation` (SwiGLU, GeGLU)": gated,
    "`activation` (GELU, SiLU)": plain,
    "`activation` (ReLU)": partial(plain, kind="relu"),
    "`dropout`": dropout,
    "`rotary` (queries and keys)": rotary,
    "`linear_cross_entropy` (a frozen head and the loss)": last_layer,
    "a whole frozen block that is recomputed in backward": frozen_block,
}


def test_every_row_is_measured() -> None:
    rows = table("docs/retention.md", "op")
    assert rows.keys() == MEASURED.keys()
    for name, cells in rows.items():
        meant = ""
        for state, cell in zip(STATES, cells, strict=True):
            meant = meant if cell == "the same" else cell
            if meant != "–":
                got = MEASURED[name](state)
                expected = WORDS[meant] or [None] * len(got)
                assert got == expected, (name, state, meant)
