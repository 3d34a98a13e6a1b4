"""torch.func, forward mode and higher derivatives around every op: the right answer or an error that names the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surroundings import CASES, Case
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd import functional as eager
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
every_op = pytest.mark.parametrize("name", list(CASES))

REFUSALS = (
    "has a forward-mode tangent, but safe_kernels::",
    "has no derivative inside torch.func's transforms; use torch.autograd.grad",
    "cannot be differentiated twice: its backward is a fused kernel",
)
Op = Callable[..., Tensor]


def outcome(run: Callable[[Op], Any], op: Op) -> list[Tensor] | RuntimeError:
    """What a transform of an op gives; NotImplementedError is a RuntimeError."""
    try:
        return tree_leaves(run(op))
    except RuntimeError as error:
        return error


def assert_right_or_refused(case: Case, run: Callable[[Op], Any], refused: bool) -> None:
    got = outcome(run, case.op)
    if refused:
        assert isinstance(got, RuntimeError) and any(words in str(got) for words in REFUSALS), got
        return
    expected = outcome(run, case.stock)
    torch.testing.assert_close(got, expected)


def scalar(op: Op) -> Op:
    return lambda *inputs: op(*inputs).sin().sum()


def all_of(inputs: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


REVERSE_IN_FUNC: dict[str, Callable[[list[Tensor]], Callable[[Op], Any]]] = {
    "grad": lambda i: lambda op: torch.func.grad(scalar(op), all_of(i))(*i),
    "vjp": lambda i: lambda op: torch.func.vjp(scalar(op), *i)[1](torch.tensor(1.0, dtype=torch.float64)),
    "jacrev": lambda i: lambda op: torch.func.jacrev(op, all_of(i))(*i),
    "vmap of grad": lambda i: lambda op: torch.func.vmap(torch.func.grad(scalar(op)))(*[t[None] for t in i]),
}
FORWARD_MODE: dict[str, Callable[[list[Tensor]], Callable[[Op], Any]]] = {
    "jvp": lambda i: lambda op: torch.func.jvp(op, tuple(i), tuple(i)),
    "jacfwd": lambda i: lambda op: torch.func.jacfwd(op, all_of(i))(*i),
    "linearize": lambda i: lambda op: torch.func.linearize(op, *i)[1](*i),
    "forward-mode jacobian": lambda i: lambda op: eager.jacobian(op, tuple(i), vectorize=True, strategy="forward-mode"),
}
TWICE: dict[str, Callable[[list[Tensor]], Callable[[Op], Any]]] = {
    "hessian": lambda i: lambda op: eager.hessian(scalar(op), tuple(i)),
    "hvp": lambda i: lambda op: eager.hvp(scalar(op), tuple(i), tuple(i))[1],
    "double backward jvp": lambda i: lambda op: eager.jvp(op, tuple(i), tuple(i))[1],
}
ONCE: dict[str, Callable[[list[Tensor]], Callable[[Op], Any]]] = {
    "jacobian": lambda i: lambda op: eager.jacobian(op, tuple(i)),
    "vectorised jacobian": lambda i: lambda op: eager.jacobian(op, tuple(i), vectorize=True),
    "nested vmap": lambda i: lambda op: torch.func.vmap(torch.func.vmap(op))(*[torch.stack([t, -t])[None] for t in i]),
}


@every_op
@pytest.mark.parametrize("transform", list(REVERSE_IN_FUNC))
def test_torch_func_cannot_differentiate_an_op_and_is_told_so(name: str, transform: str) -> None:
    inputs = CASES[name].inputs(False)
    assert_right_or_refused(CASES[name], REVERSE_IN_FUNC[transform](inputs), refused=True)


@every_op
@pytest.mark.parametrize("transform", list(FORWARD_MODE))
def test_forward_mode_is_refused(name: str, transform: str) -> None:
    inputs = CASES[name].inputs(False)
    assert_right_or_refused(CASES[name], FORWARD_MODE[transform](inputs), refused=True)


@every_op
@pytest.mark.parametrize("transform", list(TWICE))
def test_second_derivatives_are_refused_but_for_linear_ops(name: str, transform: str) -> None:
    inputs = CASES[name].inputs(False)
    assert_right_or_refused(CASES[name], TWICE[transform](inputs), refused=name not in ("dropout", "rotary"))


@every_op
@pytest.mark.parametrize("transform", list(ONCE))
def test_reverse_mode_and_vmap_are_right(name: str, transform: str) -> None:
    inputs = CASES[name].inputs(False)
    assert_right_or_refused(CASES[name], ONCE[transform](inputs), refused=False)


@every_op
@given(st.data())
def test_vmap_over_any_arguments_and_its_gradient_from_outside(name: str, data: Any) -> None:
    case = CASES[name]
    over = data.draw(st.lists(st.booleans(), min_size=len(case.shapes), max_size=len(case.shapes)).filter(any))
    trains = data.draw(st.lists(st.booleans(), min_size=len(case.shapes), max_size=len(case.shapes)))
    inputs = [
        (torch.stack([t, -2 * t, t + 1]) if batched else t).requires_grad_(train)
        for t, batched, train in zip(case.inputs(False), over, trains, strict=True)
    ]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def run(op: Op) -> Any:
        out = torch.func.vmap(op, tuple(0 if batched else None for batched in over))(*inputs)
        assert out.requires_grad == bool(wanted)
        return out, torch.autograd.grad(out.sin().sum(), wanted) if wanted else ()

    assert_right_or_refused(case, run, refused=False)


@every_op
def test_a_transform_around_an_op_that_it_does_not_differentiate_changes_nothing(name: str) -> None:
    inputs = CASES[name].inputs(True)
    factor = torch.tensor(1.5, dtype=torch.float64)

    def run(op: Op) -> Any:
        slope = torch.func.grad(lambda factor: (op(*inputs) * factor).sum())(factor)
        return slope, torch.autograd.grad(slope, inputs)

    assert_right_or_refused(CASES[name], run, refused=False)


@every_op
def test_no_grad_inside_a_transform_makes_a_constant(name: str) -> None:
    x, *others = CASES[name].inputs(False)

    def run(op: Op) -> Any:
        def loss(x: Tensor) -> Tensor:
            with torch.no_grad():
                out = op(x, *others).sum()
            return (out * x).sum()

        return torch.func.grad(loss)(x)

    assert_right_or_refused(CASES[name], run, refused=False)


@every_op
@pytest.mark.parametrize("through", ["dual tensors", "torch.func.jvp"])
def test_a_tangent_of_the_gradient_is_refused_and_not_dropped(name: str, through: str) -> None:
    inputs = CASES[name].inputs(True)
    out = CASES[name].op(*inputs)
    grad = torch.ones_like(out)

    def pull_back(grad: Tensor) -> Any:
        return torch.autograd.grad(out, inputs, grad)

    with pytest.raises(NotImplementedError, match=r"(grad|x) has a forward-mode tangent"):
        if through == "torch.func.jvp":
            torch.func.jvp(pull_back, (grad,), (grad,))
        else:
            with forward_ad.dual_level():
                pull_back(forward_ad.make_dual(grad, grad))


@every_op
def test_batches_of_gradients_are_right(name: str) -> None:
    def run(op: Op) -> Any:
        inputs = CASES[name].inputs(True)
        out = op(*inputs)
        return torch.autograd.grad(out, inputs, torch.stack([out.detach(), -out.detach()]), is_grads_batched=True)

    assert_right_or_refused(CASES[name], run, refused=False)
