"""Calls of every registered op, backward ones included, with one or two arguments that are wrong or merely odd.

Plain Python and a seed, so that the drivers under AddressSanitizer walk the same calls as the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from safe_kernels import reference

ROWS, D_IN, D_OUT, RANK = 7, 5, 4, 3
OPS = {op.__name__: op for op in reference.OPS}
PYTHON_ERRORS = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, OverflowError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FAR = 2**62
OVERFLOWS = ("huge", "inf", "e+300", "denormal", "weight: nan")
"""Where the order of the products decides what is NaN; a NaN weight in a backward op only, of an output without one."""

Change = Callable[[Tensor], Any]

SHAPES = {
    **dict.fromkeys(["x", "retained", "gate", "up"], (ROWS, D_IN)),
    **dict.fromkeys(["base", "residual"], (ROWS, D_OUT)),
    "z": (ROWS, RANK),
    **dict.fromkeys(["lora_A", "W_down"], (RANK, D_IN)),
    **dict.fromkeys(["lora_B", "W_up"], (D_OUT, RANK)),
    "b_down": (RANK,),
    **dict.fromkeys(["magnitude", "norm", "b_up"], (D_OUT,)),
    **dict.fromkeys(["mean", "rstd"], (ROWS,)),
}
"""Of those tensors that have the same shape in every op."""

CONV_SHAPES = {
    "x": (ROWS, D_IN, 6),
    "grad": (ROWS, D_OUT, 3),
    "weight": (D_OUT, D_IN, 2),
    "bias": (D_OUT,),
    "lora_A": (RANK, D_IN, 2),
    "lora_B": (D_OUT, RANK, 1),
}
ROTARY_SHAPES = {"x": (2, 3, 2, 6), **dict.fromkeys(["cos", "sin"], (2, 3, 6))}
LISTS = {"stride": [2], "padding": [0], "dilation": [1], "x_size": list(CONV_SHAPES["x"])}
ODD_LISTS = [[], [0], [1], [3], [-1], [1, 1], [ROWS, D_IN, 5], [ROWS, D_IN, 7], [D_IN, 6], [2, ROWS, D_IN, 6]]

TENSORS: dict[str, Change] = {
    "None": lambda t: None,
    "no tensor": lambda t: 1.5,
    "a row less": lambda t: t[1:],
    "a row more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t,
    "no rows": lambda t: t[:0],
    "a feature less": lambda t: t[..., 1:],
    "no features": lambda t: t[..., :0],
    "a dimension more": lambda t: t[None],
    "no dimension": lambda t: t.sum(),
    "flat": lambda t: t.flatten(),
    **{
        str(dtype): (lambda t, dtype=dtype: t.to(dtype))
        for dtype in (*DTYPES, torch.int64, torch.bool, torch.complex64)
    },
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "meta": lambda t: t.to("meta"),
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded features": lambda t: t[..., :1].expand(t.shape),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "overlapping": lambda t: t.flatten().as_strided(t.shape, [1] * t.dim()),
    "one row, far stride": lambda t: t[:1].as_strided((1, *t.shape[1:]), (FAR, *t.stride()[1:])),
    "one feature, far stride": lambda t: t[..., :1].as_strided((*t.shape[:-1], 1), (*t.stride()[:-1], FAR)),
    "nan": lambda t: t.index_fill(0, torch.tensor([0]), torch.nan),
    "inf": lambda t: t.index_fill(0, torch.tensor([1]), -torch.inf),
    "huge": lambda t: t * 3e38,
    "denormal": lambda t: t * 1e-42,
    "requires grad": lambda t: t.clone().requires_grad_(),
}
STATES = ["None", "no tensor", "a row less", "a row more", "no dimension", "a dimension more", "meta", "torch.float32"]
STARTS: dict[str, Change] = {
    "beyond": lambda t: torch.tensor([ROWS]),
    "far beyond": lambda t: torch.tensor([FAR]),
    "before": lambda t: torch.tensor([-1]),
    "far before": lambda t: torch.tensor([-(2**63)]),
    "overlapping": lambda t: torch.tensor([0, 0, 1, 6]),
    "backwards": lambda t: torch.tensor([6, 3, 0]),
    "none": lambda t: t[:0],
    "strided": lambda t: torch.stack([t, t - 100], -1)[..., 0],
    "int32": lambda t: t.int(),
}
TARGETS: dict[str, Change] = {
    **{what: TENSORS[what] for what in (*STATES, "no rows", "expanded rows", "every second", "sparse", "nested")},
    "beyond": lambda t: t + D_OUT,
    "far beyond": lambda t: t.index_fill(0, torch.tensor([1]), FAR),
    "before": lambda t: t.index_fill(0, torch.tensor([1]), -1),
    "ignored": lambda t: t * 0 - 100,
    "int32": lambda t: t.int(),
}
WEIGHTS: dict[str, Change] = {
    "bool": lambda t: t > 0,
    "int64": lambda t: t.long(),
    "half": lambda t: t.half(),
    "nan": lambda t: t * torch.nan,
    "negative": lambda t: -t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "all zero": lambda t: t * 0,
}
KINDS = ["gelu", "relu", "gelu_tanh", "tanh", "", "silu\0", None, 3]
VALUES: dict[str, list[Any]] = {
    "kind": KINDS,
    "activation": KINDS,
    "dropout_p": [0.0, 0.25, 1.0, -0.1, 1.5, float("nan"), float("inf"), None, "0.1"],
    "scaling": [0.0, -3.0, float("inf"), float("nan"), 1e300, None, "1"],
    "eps": [0.0, 1e-30, -1.0, float("nan"), float("inf"), None],
    "ignore_index": [-100, 0, 2, -1, FAR, 2**64, None, 1.5],
    "softcap": [0.0, 0.5, 30.0, -1.0, float("nan"), float("inf"), None],
    "groups": [1, 2, 3, 0, -1, FAR, 2**64, None, 1.5],
    "weight_offset": [0.0, 1.0, float("nan"), None],
    "block_rows": [0, -1, 1, 7, 8, 100, 8193, FAR, -(2**63), 2**64, None],
    "retain_output": [True, False],
    "from_output": [True, False],
    "transposed": [True, False],
}


def shape_of(op: str, name: str) -> tuple[int, ...]:
    if op.startswith("lora_conv"):
        return CONV_SHAPES[name]
    if op == "rotary":
        return ROTARY_SHAPES[name]
    if name == "grad":
        return (ROWS, D_OUT if op.startswith(("lora", "dora", "bottleneck")) else D_IN)
    if name in ("weight", "bias") and op.startswith(("lora_linear", "dora", "linear_cross")):
        return (D_OUT, D_IN) if name == "weight" else (D_OUT,)
    return SHAPES.get(name, (D_IN,))


def arguments_of(op: str, random: Random) -> dict[str, Any]:
    """A call that is right, by argument name."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    found: dict[str, Any] = {}
    for argument in getattr(torch.ops.safe_kernels, op).default._schema.arguments:
        name, kind = argument.name, str(argument.type)
        if name == "rng_state":
            found[name] = torch.tensor([random.randrange(2**63), -random.randrange(2**63)])
        elif name == "block_starts":
            found[name] = torch.tensor([0, 3])
        elif name == "target":
            found[name] = torch.tensor([random.choice([*range(D_OUT), -100]) for _ in range(ROWS)])
        elif name == "row_weight":
            found[name] = (torch.arange(ROWS) % 3 != 1).float()
        elif kind in ("Tensor", "Optional[Tensor]"):
            values = torch.randn(shape_of(op, name), generator=generator)
            found[name] = values.abs() + 0.5 if name in ("rstd", "weight", "norm") else values
        elif name in LISTS:
            found[name] = LISTS[name]
        elif kind.startswith("List"):
            found[name] = [random.random() < 0.7 for _ in range(int(argument.N))]
        else:
            numbers = {"dropout_p": 0.25, "eps": 1e-3, "block_rows": 3, "ignore_index": -100, "groups": 1}
            found[name] = {"kind": "silu", "activation": "silu", **numbers}.get(name, 0.5)
    return found | {
        name: random.random() < 0.5 for name in ("retain_output", "from_output", "transposed") if name in found
    }


def mutated(op: str, random: Random) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a call, and what is odd about them."""
    found = arguments_of(op, random)
    told = []
    for name in random.sample(sorted(found), random.choice([1, 1, 2])):
        before = found[name]
        if name in LISTS:
            found[name], what = random.choice(ODD_LISTS), ""
        elif isinstance(before, list):
            found[name], what = random.choice([[], [True], [True] * 9, [True] * len(before), [False] * len(before)]), ""
        elif not isinstance(before, Tensor):
            found[name], what = random.choice(VALUES[name]), ""
        else:
            changes = {"block_starts": STARTS, "row_weight": WEIGHTS, "target": TARGETS}.get(name, TENSORS)
            if name == "rng_state" or (changes is not TENSORS and random.random() < 0.3):
                changes = {what: TENSORS[what] for what in STATES}
            what = random.choice(sorted(changes))
            found[name] = changes[what](before)
        told.append(f"{name}: {what or found[name]}")
    return found, told


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Tensor, ...] | Exception:
    try:
        results = call(**arguments)
    except PYTHON_ERRORS as error:
        return error
    return results if isinstance(results, tuple) else (results,)


def check(op: str, arguments: dict[str, Any], told: list[str]) -> bool:
    """Call an op and its reference; returns whether it answered at all.

    Raises:
        AssertionError: What it answered is not what the reference did, or an error says nothing.
    """
    got = outcome(getattr(torch.ops.safe_kernels, op), arguments)
    if isinstance(got, Exception):
        assert str(got).strip(), f"{op} with {told}: an error without a word"
        return False
    expected = outcome(OPS[op], arguments)
    assert not isinstance(expected, Exception), f"{op} with {told} answered, and the reference says {expected!r}"
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device), f"{op} with {told}"
        if ours.is_meta:
            continue
        a, b = ours.detach().double(), theirs.detach().double()
        finite = a.isfinite() & b.isfinite()
        scale = 1.0 + (b[finite].abs().max().item() if finite.any() else 0.0)
        error = (a[finite] - b[finite]).abs().max().item() if finite.any() else 0.0
        coarse = any(isinstance(t, Tensor) and t.dtype in DTYPES[2:] for t in arguments.values())
        assert error <= (5e-2 if coarse else 1e-3) * scale, f"{op} with {told}: error {error} of {scale}"
        overflows = any(word in what for what in told for word in OVERFLOWS)
        assert overflows or torch.equal(a.isnan(), b.isnan()), f"{op} with {told}: nan in other places"
    return True
