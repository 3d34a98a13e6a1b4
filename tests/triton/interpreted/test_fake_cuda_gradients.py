"""Gradients, retention and tracing on CUDA tensors that do not exist.

Two things are missing where there is no driver. Building a graph asks CUDA's device guard for a stream, and a torch
without CUDA has no such guard ("PyTorch is not linked with support for cuda devices", which ends the process: it is
thrown where nothing may be). A torch with CUDA but without a device is helped by FakeTensorMode itself, which sets a
guard that does nothing (`torch._C._ensureCUDADeviceGuardSet`); here the one of the meta device is put into CUDA's
place, to the same effect. And the autograd engine adds gradients up on the current accelerator's stream ("Cannot access
accelerator device when none is available"), so that neither `backward` nor AOTAutograd's joint graph can be had. A node
by itself needs no engine: it is called as the engine would call it, and dispatches its backward op to fake tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import safe_kernels
from safe_kernels.retention import measure

ROWS, D_IN, D_OUT, RANK = 10, 32, 48, 4
HALF, SINGLE = torch.bfloat16, torch.float32
CUDA, META = 1, 14  # c10::DeviceType
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _a_guard_that_does_nothing() -> Iterator[None]:
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[CUDA] = guards[CUDA], guards[META]
    yield
    guards[CUDA] = before


SHAPES = {
    "x": (2, ROWS // 2, D_IN),
    "base": (2, ROWS // 2, D_OUT),
    "weight": (D_OUT, D_IN),
    "bias": (D_OUT,),
    "lora_A": (RANK, D_IN),
    "lora_B": (D_OUT, RANK),
    "magnitude": (D_OUT,),
    "residual": (2, ROWS // 2, D_OUT),
    "W_down": (RANK, D_IN),
    "b_down": (RANK,),
    "W_up": (D_OUT, RANK),
    "b_up": (D_OUT,),
    "scale": (D_IN,),
    "shift": (D_IN,),
    "up": (2, ROWS // 2, D_IN),
    "heads": (2, ROWS // 2, 3, D_IN),
}
CALLS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    "lora": (("x", "base", "lora_A", "lora_B"), lambda *t: safe_kernels.lora(*t, 2.0, dropout_p=0.1)),
    "lora_linear": (
        ("x", "weight", "bias", "lora_A", "lora_B"),
        lambda *t: safe_kernels.lora_linear(*t, 2.0, dropout_p=0.1),
    ),
    "dora": (
        ("x", "bias", "lora_A", "lora_B", "magnitude"),
        lambda x, *t: safe_kernels.dora(x, x.new_full(SHAPES["weight"], 0.5), *t, 2.0, dropout_p=0.1),
    ),
    "bottleneck": (
        ("x", "residual", "W_down", "b_down", "W_up", "b_up"),
        lambda *t: safe_kernels.bottleneck(*t, "gelu", 2.0, dropout_p=0.1),
    ),
    "rms_norm": (("x", "scale"), lambda *t: safe_kernels.rms_norm(*t, 1e-6)),
    "rms_norm from x": (("x", "scale"), lambda *t: safe_kernels.rms_norm(*t, 1e-6, retain_output=False)),
    "layer_norm": (("x", "scale", "shift"), lambda *t: safe_kernels.layer_norm(*t, 1e-6)),
    "activation": (("x",), lambda x: safe_kernels.activation(x, "gelu", dropout_p=0.1)),
    "gated_activation": (("x", "up"), lambda *t: safe_kernels.gated_activation(*t, "silu", dropout_p=0.1)),
    "rotary": (("heads",), lambda x: torch.ops.safe_kernels.rotary(x, *x.new_ones(2, 1, ROWS // 2, D_IN))),
    "dropout": (("x",), lambda x: safe_kernels.dropout(x, 0.3)),
}
SUBSETS = [
    (op, wanted)
    for op, (names, _) in CALLS.items()
    for wanted in chain.from_iterable(combinations(names, count) for count in range(1, len(names) + 1))
]


def tensors(op: str, device: str, wanted: tuple[str, ...] = ()) -> Tensors:
    made = {name: torch.empty(SHAPES[name], device=device, dtype=HALF) for name in CALLS[op][0]}
    return {name: tensor.fill_(0.5).requires_grad_(name in wanted) for name, tensor in made.items()}


def backward(out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the engine would do with a graph of one node: leaves and their gradients."""
    node: Any = out.grad_fn
    others = [None] * (len(node._input_metadata) - 1)
    found = zip(node.next_functions, node(torch.ones_like(out), *others), strict=True)
    return [(below.variable, grad) for (below, _), grad in found if below is not None]


@pytest.mark.parametrize(("op", "wanted"), SUBSETS, ids=lambda part: part if isinstance(part, str) else "+".join(part))
def test_gradients_and_what_is_retained_for_them(op: str, wanted: tuple[str, ...]) -> None:
    """To the byte what the same call retains on a CPU, where a `layer_norm` of 16 bits keeps no mean."""
    call = CALLS[op][1]
    real = tensors(op, "cpu", wanted)
    parameters = {name for name in real if len(SHAPES[name]) < 3}
    expected = measure(lambda: call(*real.values()), exclude=[real[name] for name in parameters])
    with FakeTensorMode():
        fake = tensors(op, "cuda", wanted)
        retained = measure(lambda: call(*fake.values()), exclude=[fake[name] for name in parameters])
        grads = backward(retained.output)
    kept = [tensor[:3] for tensor in expected.tensors]
    kept += [((2, ROWS // 2), SINGLE, 4 * ROWS)] if op == "layer_norm" else []
    assert retained.bytes == sum(nbytes for *_, nbytes in kept)
    assert sorted((tensor[:3] for tensor in retained.tensors), key=str) == sorted(kept, key=str)
    assert {id(leaf) for leaf, _ in grads} == {id(fake[name]) for name in wanted}
    assert all((g.shape, g.dtype, g.device) == (leaf.shape, leaf.dtype, leaf.device) for leaf, g in grads)
    assert retained.output.device.type == "cuda"


def test_a_frozen_adapter_retains_nothing() -> None:
    with FakeTensorMode():
        fake = tensors("lora", "cuda", ("x", "base"))
        retained = measure(lambda: safe_kernels.lora(*fake.values(), 2.0), exclude=[fake["lora_A"], fake["lora_B"]])
        assert len(backward(retained.output)) == 2
    assert retained.bytes == 0


@pytest.mark.parametrize("op", CALLS)
def test_forward_and_backward_are_traced_as_one_op_each(op: str) -> None:
    names, call = CALLS[op]

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        out = call(*given)
        return out, *(grad for _, grad in backward(out))

    with FakeTensorMode():
        graph = make_fx(step)(*tensors(op, "cuda", names).values()).graph
    targets = [str(node.target) for node in graph.nodes if "safe_kernels" in str(node.target)]
    stem = op.split()[0]
    back = stem if stem in ("dropout", "rotary") else f"{stem}_backward"
    assert targets == [f"safe_kernels.{stem}.default", f"safe_kernels.{back}.default"]
    values = [node.meta.get("val") for node in graph.nodes]
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"cuda"}


class Layer(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.call = CALLS[op][1]

    def forward(self, *given: Tensor) -> Tensor:
        return self.call(*given)


@pytest.mark.parametrize("op", ["lora", "lora_linear", "layer_norm", "gated_activation"])
def test_it_exports_and_compiles_whole(op: str) -> None:
    """Without gradients: AOTAutograd would run the engine."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with FakeTensorMode() as mode:
        given = tuple(tensors(op, "cuda").values())
    exported = torch.export.export(Layer(op), given)
    assert f"safe_kernels.{op}.default" in exported.graph_module.code
    with mode:
        out = torch.compile(CALLS[op][1], backend=keep, fullgraph=True)(*given)
    assert (out.device.type, out.dtype) == ("cuda", HALF)
    assert [f"safe_kernels.{op}" in graph.code for graph in graphs] == [True]
