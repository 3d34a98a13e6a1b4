"""Attention of any Python file: what its code may do so that it is recognised, and what may change in it afterwards."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import safe_kernels
from safe_peft.binding.blocks.base import SafePart
from safe_peft.binding.blocks.rotary import Rotary
from safe_peft.binding.class_swap import restore_class, swap_class

SOURCE = """
import functools
import torch
from torch import nn

calls = 0
factors = {"q": 1.0}
one = torch.ones(())


def turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def apply_rotary(q, k, cos, sin, *, scale=1.0):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q_out, k_out = q * cos * scale + turned(q) * sin, k * cos * scale + turned(k) * sin
    return q_out, k_out


class Attention(nn.Module):
    def forward(self, q, k, cos, sin):
        found = apply_rotary(q, k, cos, sin)
        return found
"""
BODY = SOURCE[SOURCE.index("    q_out, ") : SOURCE.index("class")]


class Run:
    """An attention module of a new file, called with the op and without it."""

    def __init__(self, *changes: tuple[str, str]) -> None:
        source = SOURCE
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        self.file = ModuleType("remote.modeling")
        self.file.__package__ = "remote"
        exec(compile(source, "remote/modeling.py", "exec"), self.file.__dict__)
        self.module = self.file.Attention()
        self.part = Rotary.recognise(self.module)
        shapes = ((2, 5, 3, 8), (2, 5, 1, 8), (1, 5, 8), (1, 5, 8))
        generator = torch.Generator().manual_seed(0)
        self.given = [torch.randn(*shape, generator=generator) for shape in shapes]

    def __call__(self, bound: bool, dtype: torch.dtype = torch.float32) -> Any:
        q, k, cos, sin = (tensor.to(dtype) for tensor in self.given)
        if bound and self.part is not None:
            swap_class(self.module, SafePart, self.part)
        found = self.module(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        restore_class(self.module)
        return found

    def assert_same(self) -> None:
        torch.testing.assert_close(self(True), self(False), rtol=1e-5, atol=1e-5)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the op was called with."""
    calls, op = list[Tensor](), safe_kernels.rotary
    monkeypatch.setattr(safe_kernels, "rotary", lambda x, *others: (calls.append(x), op(x, *others))[1])
    return calls


def helper(file: ModuleType) -> None:
    own = file.turned
    file.turned = lambda x: own(x) * 0.5


COMPREHENSION = (BODY, "    return tuple(x * cos + turned(x) * sin for x in (q, k))\n")
DECORATED = (
    "class Attention",
    "def decorator(function, factor):\n    @functools.wraps(function)\n    def call(*args):\n"
    "        q, k = function(*args)\n        return q * factor, k\n"
    "    def change():\n        nonlocal factor\n        factor = 0.5\n"
    "    return call, change\n\napply_rotary, change = decorator(apply_rotary, 1.0)\n\nclass Attention",
)
CHANGES: dict[str, tuple[tuple[tuple[str, str], ...], Callable[[ModuleType], object]]] = {
    "helper": ((), helper),
    "helper in a comprehension": ((COMPREHENSION,), helper),
    "helper behind a decorator": ((DECORATED,), helper),
    "variable around": ((DECORATED,), lambda file: file.change()),
    "code": ((), lambda file: setattr(file.turned, "__code__", (lambda x: x).__code__)),
    "keyword default": ((), lambda file: file.apply_rotary.__kwdefaults__.update(scale=0.5)),
    "default": (
        (("turned(x):", "turned(x, by=1.0):"), ("(-second", "(-second * by")),
        lambda file: setattr(file.turned, "__defaults__", (0.5,)),
    ),
    "name over a builtin": (
        (("* cos * scale", "* cos * float(1)"),),
        lambda file: setattr(file, "float", lambda number: number / 2),
    ),
    "code of the forward": (
        (),
        lambda file: setattr(file.Attention.forward, "__code__", (lambda self, q, k, cos, sin: (q, k)).__code__),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_function_is_seen(change: str, ops: list[Tensor]) -> None:
    changes, act = CHANGES[change]
    run = Run(*changes)
    before = run(True)
    assert len(ops) == 2
    act(run.file)
    assert run.part is not None
    assert run.part.refusal(run.module) is not None
    assert not torch.allclose(run(False)[0], before[0])
    run.assert_same()
    assert len(ops) == 2


def test_a_change_inside_of_the_forward_is_seen(ops: list[Tensor]) -> None:
    run = Run(("        found =", "        self.hook()\n        found ="))
    run.module.hook = lambda: setattr(run.file, "turned", torch.cos)
    run.assert_same()
    assert ops == []


LATER = {
    "three results": (("return q_out, k_out", "return q_out, k_out, 7"),),
    "a list": (("return q_out, k_out", "return [q_out, k_out]"),),
    "writes to q": (("return q_out, k_out", "return q.copy_(q_out), k_out"),),
    "counts": (("    q_out, ", "    global calls\n    calls += 1\n    q_out, "),),
    "counts by a decorator": (
        DECORATED,
        ("        return q * factor", "        nonlocal factor; factor += 0\n        return q * factor"),
    ),
    "logs": (("calls = 0", "calls = []"), ("    q_out, ", "    calls.append(q)\n    q_out, ")),
    "reads a dict": (("* cos * scale", '* cos * factors["q"]'),),
    "reads a tensor": (("* cos * scale", "* cos * one"),),
    "reads another module": (("import functools", "import sys as ops"), ("* cos", "* ops.float_info.radix / 2 * cos")),
    "the forward counts": (("        found =", "        global calls\n        calls += 1\n        found ="),),
    "the forward writes to globals()": (("        found =", "        globals()['calls'] += 1\n        found ="),),
    "the forward does not call it": (("found = apply_rotary(", "found = self.apply_rotary("),),
}


@pytest.mark.parametrize("what", LATER)
def test_what_the_op_would_not_do_is_not_recognised(what: str) -> None:
    run = Run(*LATER[what])
    assert run.part is None
    assert run.file.calls in (0, []), "a trial call must not be seen either"
    assert Run().part is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_function(dtype: torch.dtype, ops: list[Tensor]) -> None:
    for changes, count in (((), 2), ((("    cos, sin =", "    q, k = q.float(), k.float()\n    cos, sin ="),), 0)):
        run = Run(*changes)
        ops.clear()
        assert [tensor.dtype for tensor in run(True, dtype)] == [tensor.dtype for tensor in run(False, dtype)]
        assert len(ops) == (2 if dtype == torch.float32 else count)


def test_imports_and_warnings_of_the_forward(monkeypatch: pytest.MonkeyPatch, ops: list[Tensor]) -> None:
    package, other = ModuleType("remote"), ModuleType("remote.other")
    package.__path__, other.factor = [], 2.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "remote", package)
    monkeypatch.setitem(sys.modules, "remote.other", other)
    lines = "from .other import factor\n        import warnings; warnings.warn(__name__)\n        q = q * factor\n"
    run = Run(("        found =", f"        {lines}        found ="))
    with pytest.warns(UserWarning, match=re.escape("remote.modeling")):
        run.assert_same()
    assert len(ops) == 2


@pytest.mark.parametrize(("argument", "count"), [("scale=1.0", 2), ("scale=0.5", 0), ("scale=q.new_ones(())", 0)])
def test_a_default_that_is_given_by_name(argument: str, count: int, ops: list[Tensor]) -> None:
    run = Run(("apply_rotary(q, k, cos, sin)\n", f"apply_rotary(q, k, cos, sin, {argument})\n"))
    run.assert_same()
    assert len(ops) == count


UNUSUAL = {
    "class": (
        "class Attention",
        "class Decorator:\n    def __init__(self, function):\n        functools.update_wrapper(self, function)\n"
        "    def __call__(self, *args):\n        return self.__wrapped__(*args)\n"
        "    def __get__(self, module, kind):\n        return functools.partial(self, module) if module else self\n"
        "class Attention",
    ),
    "variable without a value": (
        "class Attention",
        "def Decorator(function):\n    @functools.wraps(function)\n    def call(*args):\n        if not args: late\n"
        "        return function(*args)\n    return call\n    late = 1\nclass Attention",
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_decorators(kind: str) -> None:
    Run(UNUSUAL[kind], ("    def forward", "    @Decorator\n    def forward")).assert_same()


def test_a_function_with_an_invalid_signature_is_passed_over() -> None:
    run = Run(("class Attention", "turned.__signature__ = 7\nclass Attention"), ("found = ", "turned(q); found = "))
    assert run.part is not None
    run.assert_same()
