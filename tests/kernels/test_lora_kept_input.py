"""What `lora` and `lora_linear` keep in place of x: x A' where lora_B alone trains, a copy of a part of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import DTYPES, Dtypes, Shape, problem, rng_state
from torch import Tensor, nn

import safe_kernels
from safe_kernels.retention import measure

SHAPE = Shape(37, 33, 20, 8)
STATE = rng_state(7)
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def layers(weight: Tensor, dropout_p: float) -> dict[str, Layer]:
    options = {"dropout_p": dropout_p, "rng_state": STATE if dropout_p else None}
    return {
        "lora": lambda x, A, B: safe_kernels.lora(x, nn.functional.linear(x, weight), A, B, 2.0, **options),
        "lora_linear": lambda x, A, B: safe_kernels.lora_linear(x, weight, None, A, B, 2.0, **options),
    }


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d.x == d.adapter or d.x == torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_the_gradient_of_B_alone(op: str, dtypes: Dtypes, dropout_p: float, wants_x: bool) -> None:
    """The same as when lora_A trains too, and x is kept."""
    p = problem(SHAPE, dtypes)
    layer = layers(torch.randn(20, 33).to(dtypes.x), dropout_p)[op]
    x, B = p.x.requires_grad_(wants_x), p.B.requires_grad_()
    wanted = (B, x) if wants_x else (B,)
    grads = []
    for trains_A in (False, True):
        out = layer(x, p.A.detach().requires_grad_(trains_A), B)
        grads.append(torch.autograd.grad(out, wanted, p.grad.to(out.dtype)))
    rounding = 4 * torch.finfo(dtypes.x).eps
    for got, expected in zip(*grads, strict=True):
        assert got.dtype == expected.dtype
        worst = (got.double() - expected.double()).abs().max()
        assert worst <= max(rounding, 1e-6 if dtypes.x == torch.float32 else 0) * expected.double().abs().max()


@pytest.mark.parametrize("rows", [(37,), (3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_any_number_of_rows(op: str, rows: tuple[int, ...]) -> None:
    A, B = torch.randn(8, 33), torch.randn(20, 8, requires_grad=True)
    x = torch.randn(*rows, 33)
    out = layers(torch.randn(20, 33), 0.0)[op](x, A, B)
    (grad,) = torch.autograd.grad(out.sum(), B)
    expected = 2.0 * torch.ones(20, x.numel() // 33) @ (x.reshape(-1, 33) @ A.t())
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_under_autocast_it_is_kept_in_16_bits_as_stock_does(op: str) -> None:
    A, B = torch.randn(8, 33), nn.Parameter(torch.randn(20, 8))
    weight, x = (torch.randn(rows, 33, dtype=torch.bfloat16) for rows in (20, 37))
    layer = layers(weight, 0.0)[op]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = measure(lambda: nn.functional.linear(nn.functional.linear(x, A), B), exclude=[A, B])
        ours = measure(lambda: layer(x, A, B), exclude=[A, B, weight])
    assert ours.bytes == 37 * 8 * 2
    assert ours.bytes <= stock.bytes


@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_x_may_be_written_to_where_it_is_not_kept(op: str) -> None:
    A, B, x = torch.randn(8, 33), torch.randn(20, 8, requires_grad=True), torch.randn(37, 33)
    layer = layers(torch.randn(20, 33), 0.3)[op]
    (expected,) = torch.autograd.grad(layer(x, A, B).sum(), B)
    out = layer(x, A, B)
    x.zero_()
    assert torch.equal(torch.autograd.grad(out.sum(), B)[0], expected)


@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_double_backward_is_refused(op: str) -> None:
    A, B = torch.randn(8, 33), torch.randn(20, 8, requires_grad=True)
    x = torch.randn(37, 33, requires_grad=True)
    out = layers(torch.randn(20, 33), 0.0)[op](x, A, B)
    grads = torch.autograd.grad(out.square().sum(), (x, B), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.grad(grad.sum(), B, retain_graph=True)


@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_compiled(op: str) -> None:
    torch._dynamo.reset()
    A, B, x = torch.randn(8, 33), torch.randn(20, 8, requires_grad=True), torch.randn(37, 33, requires_grad=True)
    layer = layers(torch.randn(20, 33), 0.3)[op]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x, A, B).square().sum(), (x, B))
    got = torch.autograd.grad(compiled(x, A, B).square().sum(), (x, B))
    torch.testing.assert_close(got, expected)


# ---------------------------------------------------------------- a part of a larger tensor


def parts() -> dict[str, Tensor]:
    return {
        "rows": torch.randn(8, 16, 33)[:, 0],
        "columns": torch.randn(37, 66)[:, ::2],
        "three quarters": torch.randn(48, 33)[:36],
        "all of it, transposed": torch.randn(33, 37).t(),
        "one row again and again": torch.randn(1, 33).expand(37, -1),
    }


@pytest.mark.parametrize("name", list(parts()))
@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_with_dropout_no_more_is_kept_than_a_dropped_copy(op: str, wants_x: bool, name: str) -> None:
    source = parts()[name].requires_grad_(wants_x)
    A, B, p = nn.Parameter(torch.randn(8, 33)), nn.Parameter(torch.randn(20, 8)), 0.3
    weight = nn.Parameter(torch.randn(20, 33), requires_grad=False)

    def part() -> Tensor:
        return source.detach() if not wants_x else source * 1.0 if name == "copy" else source

    layer = layers(weight, p)[op]
    stock = measure(
        lambda: nn.functional.linear(nn.functional.linear(nn.functional.dropout(part(), p), A), B),
        exclude=[A, B, weight],
    )
    ours = measure(lambda: layer(part(), A, B), exclude=[A, B, weight, STATE])
    assert ours.bytes <= stock.bytes, f"{ours}\n{stock}"
    whole = part().clone(memory_format=torch.contiguous_format)
    got, expected = (torch.autograd.grad(out.square().sum(), (A, B)) for out in (ours.output, layer(whole, A, B)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_without_dropout_a_part_is_kept_as_it_is(op: str) -> None:
    wide = torch.randn(37, 66)
    A, B = nn.Parameter(torch.randn(8, 33)), nn.Parameter(torch.randn(20, 8))
    weight = torch.randn(20, 33)
    retained = measure(lambda: layers(weight, 0.0)[op](wide[:, ::2], A, B), exclude=[A, B, weight])
    assert retained.bytes == wide.nbytes


@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_an_error_says_what_is_kept_and_what_to_do(op: str) -> None:
    A, B, x = nn.Parameter(torch.randn(8, 33)), nn.Parameter(torch.randn(20, 8)), torch.randn(37, 33)
    out = layers(torch.randn(20, 33), 0.3)[op](x, A, B)
    x.zero_()
    with pytest.raises(RuntimeError, match=r"(?s)\[37, 33\].*modified by an inplace|inplace.*keeps its input.*clone"):
        out.sum().backward()
