"""The recipe of `lora`'s input with changes in place, hooks, checkpoints, compilation and threads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from activations import KINDS
from recipes import ROWS, STATE, WIDTH, Layer, same_bits
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import safe_kernels

# ---------------------------------------------------------------- changes in place


@pytest.mark.parametrize("argument", ["gate", "up"])
def test_an_input_changed_after_lora_is_noticed(argument: str) -> None:
    layer = Layer()
    inputs = {"gate": layer.gate * 1.0, "up": layer.up * 1.0}
    out = layer.lora(layer.gated(**inputs))
    with torch.no_grad():
        inputs[argument].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), layer.B)


def test_an_input_changed_before_lora_does_no_harm() -> None:
    layer = Layer()
    expected = torch.autograd.grad(layer.lora(layer.gated()).sum(), layer.B)
    gate = layer.gate * 1.0
    x = layer.gated(gate)
    with torch.no_grad():
        gate.add_(1)
    assert same_bits(list(torch.autograd.grad(layer.lora(x).sum(), layer.B)), list(expected))


def test_a_random_state_changed_before_lora_does_no_harm() -> None:
    layer, state = Layer(), STATE.clone()
    x = safe_kernels.activation(layer.gate, "silu", dropout_p=0.5, rng_state=state)
    state.add_(1)
    got = torch.autograd.grad(layer.lora(x).sum(), layer.B)
    assert same_bits(list(got), list(torch.autograd.grad(layer.lora(x.detach()).sum(), layer.B)))


def in_the_graph(x: Tensor) -> None:
    x.mul_(2)


def beside_the_graph(x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(2)


def through_an_alias(x: Tensor) -> None:
    x.detach().mul_(2)


def through_its_data(x: Tensor) -> None:
    x.data.mul_(2)  # no version counts it


def through_numpy(x: Tensor) -> None:
    x.detach().numpy()[0] = 2.0


def cut_off(x: Tensor) -> None:
    x.detach_()


def other_data(x: Tensor) -> None:
    x.data = x.detach() * 2


def data_of_another_size(x: Tensor) -> None:
    x.data = torch.ones(2 * ROWS, WIDTH)


@pytest.mark.parametrize(
    "change",
    [
        in_the_graph,
        beside_the_graph,
        through_an_alias,
        through_its_data,
        through_numpy,
        cut_off,
        other_data,
        data_of_another_size,
    ],
    ids=lambda f: f.__name__,
)
def test_a_changed_output_is_retained_itself(change: Callable[[Tensor], None]) -> None:
    layer = Layer()
    x = layer.gated()
    change(x)
    got = torch.autograd.grad(layer.lora(x).sum(), (layer.A, layer.B))
    copy = x.detach().clone()
    expected = torch.autograd.grad(layer.lora(copy).sum(), (layer.A, layer.B))
    assert same_bits(list(got), list(expected))


# ---------------------------------------------------------------- hooks, checkpoints, compilation, threads


def test_saving_on_cpu() -> None:
    layer = Layer(dropout_p=0.3)
    expected = layer.gradients(layer.lora(layer.gated()))
    with save_on_cpu():
        out = layer.lora(layer.gated(layer.gate * 1.0))
    assert same_bits(layer.gradients(out), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
@pytest.mark.parametrize("whole", [True, False], ids=["both-inside", "lora-outside"])
def test_activation_checkpointing(whole: bool, use_reentrant: bool) -> None:
    layer = Layer(dropout_p=0.3)

    def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor | None]:
        for leaf in layer.leaves:
            leaf.grad = None
        run(layer.gate, layer.up).square().sum().backward()
        return [leaf.grad for leaf in layer.leaves]

    def make(gate: Tensor, up: Tensor) -> Tensor:
        return layer.gated(gate * 1.0, up * 1.0)

    def block(gate: Tensor, up: Tensor) -> Tensor:
        return layer.lora(make(gate, up))

    def checkpointed(gate: Tensor, up: Tensor) -> Tensor:
        if whole:
            return checkpoint(block, gate, up, use_reentrant=use_reentrant)
        return layer.lora(checkpoint(make, gate, up, use_reentrant=use_reentrant))

    assert same_bits(gradients(checkpointed), gradients(block))


def test_a_checkpointed_forward_keeps_nothing_alive() -> None:
    layer = Layer()
    born: list[weakref.ref[Tensor]] = []

    def block(gate: Tensor) -> Tensor:
        gate = gate * 1.0
        x = layer.gated(gate)
        born.extend((weakref.ref(gate), weakref.ref(x)))
        return layer.lora(x)

    out = checkpoint(block, layer.gate, use_reentrant=False)
    gc.collect()
    assert [ref() for ref in born] == [None, None]
    out.sum().backward()


def test_everything_dies_with_the_graph() -> None:
    layer = Layer()
    gate = layer.gate * 1.0
    x = layer.gated(gate)
    out = layer.lora(x)
    dead = [weakref.ref(tensor) for tensor in (gate, x)]
    del gate, x, out
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled_whole(dropout_p: float) -> None:
    torch._dynamo.reset()
    layer = Layer(dropout_p=dropout_p)

    def run(gate: Tensor, up: Tensor) -> Tensor:
        return layer.lora(layer.gated(gate * 2, up))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = run(layer.gate, layer.up), compiled(layer.gate, layer.up)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(layer.gradients(got), layer.gradients(expected))


def test_many_threads_get_what_one_gets() -> None:
    layers = [Layer(kind=kind, dropout_p=p) for kind in KINDS for p in (0.0, 0.3)]

    def work(i: int) -> list[Tensor | None]:
        layer = layers[i % len(layers)]
        return layer.gradients(layer.lora(layer.gated()))

    serial = [work(i) for i in range(len(layers))]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(work, range(10 * len(layers))))
    assert all(same_bits(got, serial[i % len(layers)]) for i, got in enumerate(parallel))


def test_one_output_read_by_many_threads() -> None:
    layer = Layer(dropout_p=0.3)
    x = layer.gated()
    expected = torch.autograd.grad(layer.lora(x).sum(), (layer.A, layer.B))

    def work(_: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.lora(x).sum(), (layer.A, layer.B))

    with ThreadPoolExecutor(8) as pool:
        assert all(same_bits(list(got), list(expected)) for got in pool.map(work, range(64)))
