"""`linear_cross_entropy`: losses, gradients, what is retained, and what is refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracle import DTYPES, Truth, assert_as_good
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import safe_kernels
from safe_kernels import reference
from safe_kernels.retention import measure

IGNORED = -100
KINDS = tuple(dtypes.x for dtypes in DTYPES[:4])
CHANGES = ({}, {"scaling": 0.25}, {"softcap": 3.0}, {"scaling": -1.5, "softcap": 2.0})
ops = torch.ops.safe_kernels


@dataclass
class Head:
    """A call, and the gradient of its losses."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    grad: Tensor
    options: dict[str, Any]

    def call(self, **changes: Any) -> Tensor:
        arguments = {"x": self.x, "weight": self.weight, "bias": self.bias, "target": self.target}
        return safe_kernels.linear_cross_entropy(**{**arguments, **self.options, **changes})

    def stock(self, x: Tensor) -> Tensor:
        """What transformers computes: logits in the working dtype, the loss in float32."""
        logits = F.linear(x, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.options.get("scaling", 1.0)
        if cap := self.options.get("softcap", 0.0):
            logits = cap * torch.tanh(logits / cap)
        losses = F.cross_entropy(logits.flatten(0, -2), self.target.flatten(), reduction="none")
        return losses.reshape(self.target.shape)

    def double(self) -> Head:
        tensors = {name: getattr(self, name) for name in ("x", "weight", "bias", "grad")}
        return replace(self, **{name: None if t is None else t.double() for name, t in tensors.items()})


def head(
    *leading: int, d: int = 33, classes: int = 50, dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any
) -> Head:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)

    target = torch.randint(classes, leading, generator=generator)
    target = target.where(torch.rand(leading, generator=generator) < 0.7, IGNORED)
    grad = torch.randn(leading, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    weight = normal(classes, d, scale=2 * max(d, 1) ** -0.5)
    return Head(normal(*leading, d), weight, normal(classes) if bias else None, target, grad, options)


def results(p: Head, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x = p.x.detach().requires_grad_()
    loss = run(x)
    return {"loss": loss.detach(), "x": torch.autograd.grad(loss, x, p.grad)[0]}


def check(p: Head, got: dict[str, Tensor] | None = None) -> None:
    """Judges losses and gradients; those of ignored rows are zero."""
    got = got or results(p, lambda x: p.call(x=x))
    double = p.double()
    exact, incumbent = results(double, double.stock), results(p, p.stock)
    size = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in exact.items()}
    for name, tensor in got.items():
        assert_as_good(name, tensor, incumbent[name], Truth(exact, size))
        assert not tensor[p.target == IGNORED].any()


@pytest.mark.parametrize("options", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_values(dtype: torch.dtype, options: dict[str, float]) -> None:
    check(head(3, 13, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", [kind for kind in KINDS if kind != torch.float64], ids=str)
def test_several_chunks_at_a_real_vocabulary(dtype: torch.dtype) -> None:
    check(head(70, d=8, classes=140_000, dtype=dtype, bias=False))


def test_a_gradient_that_is_not_finite_does_not_reach_ignored_rows() -> None:
    p = head(3, 13)
    p.grad = torch.full_like(p.grad, torch.inf)
    ours, stock = (results(p, run)["x"][p.target == IGNORED] for run in (lambda x: p.call(x=x), p.stock))
    assert len(ours) and torch.equal(ours, stock) and not ours.any()


@pytest.mark.parametrize("options", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_reference(dtype: torch.dtype, options: dict[str, float]) -> None:
    p = head(3, 13, dtype=dtype, **options)
    arguments = (p.x, p.weight, p.bias, p.target, IGNORED, options.get("scaling", 1.0), options.get("softcap", 0.0))
    loss, grad_x = reference.linear_cross_entropy_backward(*arguments)
    assert torch.equal(loss, reference.linear_cross_entropy(*arguments))
    check(p, {"loss": loss, "x": (grad_x * p.grad.unsqueeze(-1)).to(dtype)})


@pytest.mark.parametrize("leading", [(3, 13), (0,)], ids=str)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_code_for_gpus_by_itself(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    """The same ATen calls, here on CPU tensors: ignored rows are computed too."""
    p = head(*leading, dtype=dtype)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    arguments = (p.x, p.weight, p.bias, p.target, IGNORED, 0.5, 2.0)
    expected = ops.linear_cross_entropy_backward(*arguments)
    got = ops.linear_cross_entropy_backward.default.redispatch(key, *arguments)
    torch.testing.assert_close(got, expected)
    assert torch.equal(ops.linear_cross_entropy.default.redispatch(key, *arguments), got[0])


@pytest.mark.parametrize(
    ("leading", "sizes"),
    [((1,), {"classes": 1}), ((0,), {}), ((4, 0), {}), ((7,), {"d": 1}), ((2, 3, 4), {}), ((9,), {"classes": 257})],
    ids=str,
)
def test_shapes(leading: tuple[int, ...], sizes: dict[str, int]) -> None:
    check(head(*leading, bias=False, **sizes))


def test_one_row_without_dimensions_and_rows_without_features() -> None:
    p = head(1)
    torch.testing.assert_close(p.call(x=p.x[0], target=p.target[0]), p.call()[0])
    empty = head(5, d=0)
    torch.testing.assert_close(empty.call(), empty.stock(empty.x))


def test_any_strides() -> None:
    p = head(5, 7)
    p.x, p.target, p.grad = p.x.transpose(0, 1), p.target.t(), p.grad.t()
    p.weight = torch.stack([p.weight, p.weight], -1)[..., 0]
    check(p)
    p.weight, p.grad = p.weight.t().contiguous().t(), p.grad[:1].expand(p.grad.shape)
    check(p)


def test_losses_far_from_one() -> None:
    """Where the target's probability is zero in float32, and where it is one."""
    p = head(6, d=2, classes=2, bias=False)
    p.weight, p.target = torch.eye(2), torch.tensor([0, 0, 1, 1, 0, 1])
    p.x = torch.tensor([[-300.0, 300.0], [300.0, -300.0], [20.0, 0.0], [0.0, 20.0], [0.0, 17.0], [1e4, -1e4]])
    check(p)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("ignore_index", [IGNORED, 0, 7])
def test_ignored_rows(ignore_index: int, reduction: str) -> None:
    p = head(40)
    target = torch.randint(50, (40,)).where(torch.rand(40) < 0.5, ignore_index)
    for each in (target, torch.full_like(target, ignore_index)):
        losses = p.call(target=each, ignore_index=ignore_index)
        total = losses.sum() if reduction == "sum" else losses.sum() / (each != ignore_index).sum()
        logits = F.linear(p.x, p.weight, p.bias)
        expected = F.cross_entropy(logits, each, ignore_index=ignore_index, reduction=reduction)
        torch.testing.assert_close(total, expected, equal_nan=True)


def test_rows_do_not_depend_on_each_other() -> None:
    p = head(40)
    p.x[3], p.target[3], p.target[4] = torch.nan, 1, 1
    p.x[5], p.target[5] = torch.nan, IGNORED
    got = results(p, lambda x: p.call(x=x))
    for tensor in got.values():
        assert tensor[3].isnan().all() and not tensor[4:].isnan().any() and not tensor[:3].isnan().any()


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_gradcheck(options: dict[str, float]) -> None:
    p = head(6, d=4, classes=5, dtype=torch.float64, **options)
    assert torch.autograd.gradcheck(lambda x: p.call(x=x), (p.x.requires_grad_(),))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_opcheck(dtype: torch.dtype, trains: bool) -> None:
    p = head(3, 4, d=9, dtype=dtype)
    arguments = (p.x.requires_grad_(trains), p.weight, p.bias, p.target, IGNORED, 0.5, 2.0)
    torch.library.opcheck(ops.linear_cross_entropy.default, arguments)
    torch.library.opcheck(ops.linear_cross_entropy_backward.default, (p.x.detach(), *arguments[1:]))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_it_retains_the_gradient_of_x_and_nothing_else(dtype: torch.dtype, trains: bool) -> None:
    p = head(3, 13, dtype=dtype)
    p.x.requires_grad_(trains)
    retained = measure(p.call)
    assert (retained.output.grad_fn is not None) == trains
    assert retained.bytes == (p.x.nbytes if trains else 0), str(retained)
    with torch.no_grad():
        assert measure(p.call).bytes == 0


def test_backward_runs_again_with_other_gradients() -> None:
    p = head(9)
    x = p.x.requires_grad_()
    loss = p.call(x=x)
    one, two = (torch.autograd.grad(loss, x, grad, retain_graph=True)[0] for grad in (p.grad, 2 * p.grad))
    assert torch.equal(2 * one, two)
    assert torch.equal(one, torch.autograd.grad(checkpoint(p.call, use_reentrant=False), x, p.grad)[0])


def test_a_copy_of_the_head_gives_the_same() -> None:
    layer = nn.Linear(33, 50).requires_grad_(False)
    again = copy.deepcopy(layer)
    p = head(9)
    assert torch.equal(*(p.call(weight=each.weight, bias=each.bias) for each in (layer, again)))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("c++"), reason="C++"))]
)
def test_compiled_whole(backend: str) -> None:
    torch._dynamo.reset()
    p = head(3, 13, softcap=4.0)
    x = p.x.requires_grad_()

    def run(x: Tensor) -> Tensor:
        return torch.relu(p.call(x=x * 2.0)).sum() / (p.target != IGNORED).sum()

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    torch.testing.assert_close(*(torch.autograd.grad(each(x), x) for each in (compiled, run)))


def test_fake_and_meta_tensors() -> None:
    p = head(3, 13, dtype=torch.bfloat16)
    real = results(p, lambda x: p.call(x=x))
    with FakeTensorMode() as mode:
        fake = replace(p, **{n: mode.from_tensor(getattr(p, n)) for n in ("x", "weight", "bias", "target", "grad")})
        got = results(fake, lambda x: fake.call(x=x))
    for name, tensor in real.items():
        assert (got[name].shape, got[name].dtype, got[name].stride()) == (tensor.shape, tensor.dtype, tensor.stride())
    huge = torch.empty(2**20, 2**14, device="meta")
    assert safe_kernels.linear_cross_entropy(huge, huge, None, huge[:, 0].long()).shape == (2**20,)


def test_autocast_changes_nothing() -> None:
    p = head(9)
    expected = p.call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(p.call(), expected)


def test_flops() -> None:
    p = head(12)
    for trains, products in ((False, 1), (True, 2)):
        with FlopCounterMode(display=False) as counter:
            p.call(x=p.x.requires_grad_(trains)).sum().backward() if trains else p.call()
        assert counter.get_total_flops() == products * 2 * 12 * 33 * 50


def test_second_derivatives_are_refused() -> None:
    p = head(9)
    x = p.x.requires_grad_()
    (grad,) = torch.autograd.grad(p.call(x=x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy cannot be differentiated twice"):
        (grad.square().sum() + x.sum()).backward()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.zeros(9, 32)}, ValueError, r"weight must have shape \[classes, 32\]"),
        ({"x": torch.zeros(9, 33, dtype=torch.int64)}, TypeError, "x must be float64"),
        ({"weight": torch.zeros(0, 33)}, ValueError, "at least one class"),
        ({"weight": torch.zeros(50, 33).bfloat16()}, TypeError, "weight must have the dtype of x"),
        ({"weight": torch.zeros(50, 33, requires_grad=True)}, ValueError, "weight must not require grad"),
        ({"bias": torch.zeros(50, requires_grad=True)}, ValueError, "bias must not require grad"),
        ({"bias": torch.zeros(49)}, ValueError, r"bias must have shape \[50\]"),
        ({"bias": torch.zeros(50).double()}, TypeError, "bias must have the dtype of x"),
        ({"target": torch.zeros(8, dtype=torch.int64)}, ValueError, r"target must have shape \[9\]"),
        ({"target": torch.zeros(9, dtype=torch.int32)}, TypeError, "target must be int64"),
        ({"target": torch.full((9,), 50)}, IndexError, r"target must be in \[0, 50\) or ignore_index \(-100\), got 50"),
        ({"target": torch.full((9,), -1)}, IndexError, "target .* got -1"),
        ({"target": torch.full((9,), -100), "ignore_index": 1}, IndexError, "target .* got -100"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
        ({"scaling": float("nan")}, ValueError, "scaling must be finite"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        head(9).call(**changes)
