"""`lora` behind an activation: it retains what the activation retains, and its gradients do not change by a bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from activations import DTYPES, KINDS, normal
from recipes import ROWS, WIDTH, Layer, same_bits
from torch import Tensor

from safe_kernels.retention import measure


def through_a_view(x: Tensor) -> Tensor:
    """No longer the activation's direct output, so that x itself is retained."""
    return x.view(x.shape)


# ---------------------------------------------------------------- what is retained


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("trains", [("A", "B"), ("A",), ("B",)], ids="".join)
def test_gate_and_up_are_retained_and_nothing_else(trains: tuple[str, ...], dropout_p: float, readers: int) -> None:
    layer = Layer(dropout_p=dropout_p)
    for name in ("A", "B"):
        getattr(layer, name).requires_grad_(name in trains)

    def forward() -> list[Tensor]:
        x = layer.gated()
        return [layer.lora(x) for _ in range(readers)]

    retained = measure(forward, exclude=layer.parameters)
    assert retained.bytes == layer.gate.nbytes + layer.up.nbytes + (16 if dropout_p else 0), str(retained)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pre_activation_is_retained_and_nothing_else(dtype: torch.dtype) -> None:
    layer = Layer(dtype, "gelu")
    retained = measure(lambda: layer.lora(layer.plain()), exclude=layer.parameters)
    assert retained.bytes == layer.gate.nbytes, str(retained)


def test_halves_of_one_tensor() -> None:
    layer = Layer()
    both = normal(ROWS, 2 * WIDTH).requires_grad_()
    retained = measure(lambda: layer.lora(layer.gated(*both.chunk(2, -1))), exclude=layer.parameters)
    assert retained.bytes == both.nbytes


def test_a_frozen_adapter_retains_nothing_of_its_own() -> None:
    layer = Layer()
    layer.A.requires_grad_(False)
    layer.B.requires_grad_(False)
    retained = measure(lambda: layer.lora(layer.gated()), exclude=layer.parameters)
    assert retained.bytes == layer.gate.nbytes + layer.up.nbytes
    assert all(tensor.uses == 1 for tensor in retained.tensors)


@pytest.mark.parametrize("wanted", [(False, False), (False, True)], ids=str)
def test_where_the_activation_retains_less_x_is_retained(wanted: tuple[bool, bool]) -> None:
    """Nothing upstream trains: x alone. Only up: gate and x, as up is not needed."""
    layer = Layer()
    layer.gate.requires_grad_(wanted[0])
    layer.up.requires_grad_(wanted[1])
    retained = measure(lambda: layer.lora(layer.gated()), exclude=layer.parameters)
    assert retained.bytes == layer.gate.nbytes * (1 + wanted[1])


def test_behind_a_view_x_is_retained() -> None:
    layer = Layer()
    for view in (through_a_view, lambda x: x.reshape(3, 4, WIDTH), lambda x: x[:], lambda x: x * 1.0):
        retained = measure(lambda view=view: layer.lora(view(layer.gated())), exclude=layer.parameters)
        assert retained.bytes == 3 * layer.gate.nbytes


def test_x_that_a_training_base_retains_is_retained_by_it() -> None:
    layer = Layer()
    layer.weight.requires_grad_()
    retained = measure(lambda: layer.lora(layer.gated()), exclude=layer.parameters)
    assert retained.bytes == 3 * layer.gate.nbytes


# ---------------------------------------------------------------- the same gradients


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_change_by_a_bit(kind: str, dtype: torch.dtype, dropout_p: float) -> None:
    layer = Layer(dtype, kind, dropout_p)
    for make in (layer.gated, layer.plain):
        expected = layer.gradients(layer.lora(through_a_view(make())))
        assert same_bits(layer.gradients(layer.lora(make())), expected)


def test_gradients_of_a_subset() -> None:
    layer = Layer(dropout_p=0.3)
    for leaf in layer.leaves:
        outs = (layer.lora(layer.gated()), layer.lora(through_a_view(layer.gated())))
        got, expected = (torch.autograd.grad(out.square().sum(), leaf)[0] for out in outs)
        assert torch.equal(got, expected)


def test_one_graph_backward_twice() -> None:
    layer = Layer(dropout_p=0.3)
    out = layer.lora(layer.gated())
    first = layer.gradients(out, retain_graph=True)
    assert same_bits(layer.gradients(out), first)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        layer.gradients(out)


def test_a_reader_does_not_need_what_anothers_backward_has_freed() -> None:
    first, second = Layer(), Layer()
    x = first.gated()
    outs = first.lora(x), second.lora(x)
    expected = second.gradients(outs[1], retain_graph=True)[2:]
    first.gradients(outs[0])
    got = torch.autograd.grad(outs[1].square().sum(), (second.A, second.B))
    assert same_bits(list(got), expected)


def test_nothing_needs_the_output_or_its_name_to_live() -> None:
    layer = Layer()
    expected = layer.gradients(layer.lora(through_a_view(layer.gated())))
    x = layer.gated()
    dead, out = weakref.ref(x), layer.lora(x)
    del x
    gc.collect()
    assert dead() is None
    assert same_bits(layer.gradients(out), expected)


def test_second_derivatives_are_refused_all_the_way_up() -> None:
    """Also for gate alone, which the gradient of B depends on only through x made again."""
    layer = Layer()
    layer.A.requires_grad_(False)
    (grad_B,) = torch.autograd.grad(layer.lora(layer.gated()).sum(), layer.B, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(grad_B.sum(), layer.gate, allow_unused=True)
