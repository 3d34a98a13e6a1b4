"""What the norms retain, to the byte: one storage with what their readers retain, and 4 bytes per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_cases import CASES
from norms import MIDDLE, Norm, assert_results, norm
from oracle import DTYPES, Dtypes
from torch import Tensor, nn

import safe_kernels
from safe_kernels.retention import announce_reader, measure


def expected_bytes(p: Norm, names: tuple[str, ...], from_output: bool) -> int:
    """Output and rstd; or input, rstd and LayerNorm's mean, without it where PyTorch's statistics have 16 bits."""
    if not names:
        return 0
    per_row = 4 * p.x[..., 0].numel()
    has_16_bits = p.x.element_size() == 2 and (p.weight is None or p.weight.element_size() == 2)  # and so has the mean
    statistics = 1 if from_output or has_16_bits or p.kind.startswith("rms") else 2
    return p.x.nbytes + statistics * per_row


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("retain_output", [True, False])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
@pytest.mark.parametrize(("kind", "names"), CASES, ids=str)
def test_every_subset_of_requires_grad(
    kind: str, names: tuple[str, ...], dtypes: Dtypes, retain_output: bool, is_read: bool
) -> None:
    """The input, until a reader keeps the output."""
    p = norm(kind, dtypes=dtypes).require(*names)
    parameters = [tensor for name, tensor in p.inputs.items() if name != "x"]

    def forward() -> Tensor:
        out = p.call(retain_output)
        if is_read:
            announce_reader(out)
        return out

    retained = measure(forward, exclude=parameters)
    from_output = retain_output and is_read and names == ("x",)
    assert retained.bytes == expected_bytes(p, names, from_output), str(retained)
    if names:
        leaves = [p.inputs[name] for name in names]
        grads = torch.autograd.grad(retained.output, leaves, p.grad)
        assert_results(p, dict(zip(names, grads, strict=True)))


@pytest.mark.parametrize("names", [("x",), ("x", "weight", "bias")], ids=str)
def test_float64_statistics_take_8_bytes(names: tuple[str, ...]) -> None:
    p = norm("layer", dtypes=DTYPES[1]).require(*names)
    retained = measure(lambda: p.call(), exclude=[p.weight, p.bias])
    assert retained.bytes == p.x.nbytes + 8 * MIDDLE[0] * 2


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_output_is_what_its_readers_retain(kind: str, dtypes: Dtypes) -> None:
    """The norm before q, k and v: one tensor for four nodes, and 4 bytes per row."""
    p = norm(kind, dtypes=dtypes).require("x")
    adapters = [[nn.Parameter(torch.randn(4, 33)), nn.Parameter(torch.randn(20, 4))] for _ in range(3)]
    base = torch.randn(MIDDLE[0], 20).to(dtypes.x)

    def forward() -> list[Tensor]:
        y = p.call()
        return [safe_kernels.lora(y, base, A, B, 2.0) for A, B in adapters]

    retained = measure(forward, exclude=[adapters, [tensor for tensor in (p.weight, p.bias) if tensor is not None]])
    assert retained.bytes == p.x.nbytes + 4 * MIDDLE[0], str(retained)
    # The statistics have a dimension more where it is the output that is kept.
    assert [tensor.shape for tensor in retained.tensors] == [p.x.shape, (1, *p.x.shape[:1])]
    assert retained.tensors[0].uses == 4
    torch.stack(retained.output).sum().backward()
    assert p.x.grad is not None
    assert all(tensor.grad is not None for pair in adapters for tensor in pair)


class Same(torch.autograd.Function):
    """What FSDP2 puts before a unit: the tensor as it is, with a node of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def in_three_dimensions(y: Tensor) -> Tensor:
    return y.view(-1, 1, 33)


def a_part(y: Tensor) -> Tensor:
    return y[1:]


@pytest.mark.parametrize("hand_on", [Same.apply, in_three_dimensions, a_part])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_view_of_the_output_is_another_tensor(kind: str, hand_on: Callable[[Tensor], Tensor]) -> None:
    """A write through the .data of a view leaves no trace at the output itself."""
    p = norm(kind).require("x")
    A, B = nn.Parameter(torch.randn(4, 33)), nn.Parameter(torch.randn(33, 4))
    parameters = [tensor for tensor in (p.weight, p.bias, A, B) if tensor is not None]

    def forward(call: Callable[[], Tensor]) -> Tensor:
        y = hand_on(call())
        return safe_kernels.lora(y, y * 1.0, A, B, 2.0)

    retained = measure(lambda: forward(p.call), exclude=parameters)
    statistics = 4 * MIDDLE[0] * (1 if kind == "rms" else 2)
    assert retained.bytes == 2 * p.x.nbytes + statistics, str(retained)
    (got,) = torch.autograd.grad(retained.output.square().sum(), p.x)
    (expected,) = torch.autograd.grad(forward(lambda: p.call(retain_output=False)).square().sum(), p.x)
    assert torch.allclose(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_readers_keep_the_input_beside_the_output_when_the_weight_trains() -> None:
    p = norm("rms").require("x", "weight")
    A, B = nn.Parameter(torch.randn(4, 33)), nn.Parameter(torch.randn(20, 4))
    base = torch.randn(MIDDLE[0], 20)
    retained = measure(lambda: safe_kernels.lora(p.call(), base, A, B, 2.0), exclude=(p.weight, A, B))
    assert retained.bytes == 2 * p.x.nbytes + 4 * MIDDLE[0]


def test_a_norm_keeps_what_the_norm_after_it_keeps() -> None:
    p, q = norm("layer").require("x"), norm("rms", seed=1)
    retained = measure(lambda: q.apply(p.call(), q.weight), exclude=[p.weight, p.bias, q.weight])
    assert retained.bytes == p.x.nbytes + 2 * 4 * MIDDLE[0]


@pytest.mark.parametrize("readers", [0, 1, 2])
def test_several_norms_of_one_tensor_keep_it_once(readers: int) -> None:
    """As PyTorch's do, with one reader that trains for `readers` of the two norms."""
    first, second = norm("layer"), norm("layer", seed=1)
    source = first.x.clone().requires_grad_()
    A, B = nn.Parameter(torch.randn(4, 33)), nn.Parameter(torch.randn(33, 4))

    def forward(apply: Callable[..., Tensor], read: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = source * 1.0
        outs = [apply(x, p.weight, p.bias) for p in (first, second)]
        return [read(out) if i < readers else out for i, out in enumerate(outs)]

    exclude = [first.weight, first.bias, second.weight, second.bias, A, B]
    ours = measure(
        lambda: forward(
            lambda x, w, b: safe_kernels.layer_norm(x, w, b, 1e-5), lambda y: safe_kernels.lora(y, y, A, B, 1.0)
        ),
        exclude=exclude,
    )
    stock = measure(
        lambda: forward(
            lambda x, w, b: nn.functional.layer_norm(x, (33,), w, b, 1e-5),
            lambda y: y + nn.functional.linear(nn.functional.linear(y, A), B),
        ),
        exclude=exclude,
    )
    assert ours.bytes <= stock.bytes, f"{ours}\n{stock}"
    got, expected = (torch.autograd.grad(torch.stack(r.output).square().sum(), source)[0] for r in (ours, stock))
    torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5 * expected.abs().max().item())


def test_a_strided_input_is_not_copied_to_be_retained() -> None:
    p = norm("layer")
    wide = torch.randn(37, 66, requires_grad=True)
    retained = measure(lambda: p.apply(**{**p.inputs, "x": wide[:, ::2]}, retain_output=False), exclude=[p.weight])
    assert {tensor.bytes for tensor in retained.tensors} == {wide.nbytes, 4 * 37, p.bias.nbytes}


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_stock_pytorch_by_the_same_measure(kind: str) -> None:
    """Before a layer that trains whole: LayerNorm keeps its input too, RMSNorm four tensors more."""
    p = norm(kind).require("x")
    reader = nn.Parameter(torch.randn(20, 33))
    size, row = p.x.nbytes, 4 * MIDDLE[0]

    def layer_norm() -> Tensor:
        return nn.functional.layer_norm(p.x, (33,), p.weight, p.bias, p.eps)

    def rms_norm() -> Tensor:
        hidden = p.x.to(torch.float32)
        return p.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + p.eps))

    parameters = [tensor for tensor in (p.weight, p.bias, reader) if tensor is not None]
    stock = measure(
        lambda: nn.functional.linear({"rms": rms_norm, "layer": layer_norm}[kind](), reader), exclude=parameters
    )
    ours = measure(lambda: nn.functional.linear(p.call(), reader), exclude=parameters)
    assert stock.bytes == {"rms": 2 * size + row, "layer": 2 * size + 2 * row}[kind], str(stock)
    assert ours.bytes == {"rms": 2 * size + row, "layer": 2 * size + 2 * row}[kind], str(ours)

    def announced() -> Tensor:
        out = p.call()
        announce_reader(out)
        return nn.functional.linear(out, reader)

    assert measure(announced, exclude=parameters).bytes == size + row
