"""The measure itself, on graphs whose retained bytes are known by hand."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from leaves import BYTES, D, N, leaf
from torch import Tensor, nn

from safe_kernels.retention import RetainedTensor, measure


def test_what_a_product_retains() -> None:
    x, y = leaf(), leaf()
    retained = measure(lambda: x * y)
    assert retained.bytes == 2 * BYTES
    assert retained.tensors == (RetainedTensor((N, D), torch.float32, BYTES, 1),) * 2
    retained.output.sum().backward()
    assert torch.equal(x.grad, y)


def test_a_storage_counts_once_however_often_it_is_saved() -> None:
    x = leaf()
    retained = measure(lambda: [x * x, x.t() * 2.0, x[1:] * x[1:], x.view(-1).exp() * 0 + x.view(-1).pow(2)])
    by_shape = {tensor.shape: tensor for tensor in retained.tensors}
    assert by_shape[(N, D)].bytes == BYTES
    assert by_shape[(N, D)].uses == 5
    assert retained.bytes == 2 * BYTES  # x, and what exp returned


def test_a_slice_retains_all_it_was_cut_from() -> None:
    x = leaf()
    retained = measure(lambda: (x * 2)[0].square())
    assert retained.bytes == BYTES
    assert retained.tensors[0].shape == (D,)


def test_nothing_requires_grad() -> None:
    x = torch.randn(N, D)
    assert measure(lambda: (x * x).exp()).bytes == 0
    y = leaf()
    with torch.no_grad():
        assert measure(lambda: y.exp()).bytes == 0


def test_excluded_parameters_and_their_aliases_do_not_count() -> None:
    weight = nn.Parameter(torch.randn(D, D))
    x = leaf()
    for exclude in (weight, nn.ParameterList([weight])):
        assert measure(lambda: x @ weight, exclude=exclude).bytes == BYTES
        assert measure(lambda: x @ weight.t(), exclude=exclude).bytes == BYTES
        assert measure(lambda: x @ weight[:, :5], exclude=exclude).bytes == BYTES
        assert measure(lambda: x @ weight.detach(), exclude=exclude).bytes == 0
        assert measure(lambda: x @ weight.detach().t(), exclude=exclude).bytes == 0
        assert measure(lambda: x @ weight.data, exclude=exclude).bytes == 0
    hidden = [weight]
    assert measure(lambda: x @ hidden[0]).bytes == BYTES + weight.nbytes, "it counts unless it is named or excluded"


class Layer(nn.Linear):
    x: Tensor

    def run(self) -> Tensor:
        return self(self.x) * self.scale


def test_parameters_that_the_function_names_do_not_count() -> None:
    model = Layer(D, 5)
    model.register_buffer("scale", torch.ones(5))
    x = model.x = leaf()

    def forward(layer: Layer = model) -> Tensor:
        return layer(x) * layer.scale

    weight = model.weight
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for fn in (lambda: model(x) * model.scale, forward, model.run):
        assert measure(fn).bytes == 0
    model.requires_grad_(True)
    for fn in (lambda: model(x) * model.scale, forward, model.run):
        assert measure(fn).bytes == BYTES
    assert measure(lambda: x @ weight.t()).bytes == BYTES


def test_a_copy_of_a_parameter_counts() -> None:
    weight = nn.Parameter(torch.randn(D, D), requires_grad=False)
    x = leaf()
    assert measure(lambda: x @ weight.to(torch.float64).float(), exclude=weight).bytes == D * D * 4


def test_exclude() -> None:
    x, y = leaf(), leaf()
    module = nn.BatchNorm1d(D)
    assert measure(lambda: x * y, exclude=x).bytes == BYTES
    assert measure(lambda: x * y, exclude=[x]).bytes == BYTES
    assert measure(lambda: x * y, exclude=(tensor for tensor in (x, y.t()))).bytes == 0
    hidden = [module]
    assert measure(lambda: x * hidden[0].running_mean).bytes == D * 4
    assert measure(lambda: x * hidden[0].running_mean, exclude=module).bytes == 0
    assert measure(lambda: x * hidden[0].running_mean, exclude=[module, x]).bytes == 0


def test_only_what_is_still_held_counts() -> None:
    """A graph that was let go of, as of a metric computed on the side, retains nothing."""
    x, y = leaf(), leaf(100, 100)

    def forward() -> Tensor:
        y.exp().sum().item()
        return x.exp()

    assert measure(forward).bytes == BYTES


def test_an_address_used_again_is_another_tensor() -> None:
    """Freed blocks are handed out again within one forward: identity must not be an address alone."""
    x = leaf()
    kept = []

    def forward() -> list[Tensor]:
        for _ in range(50):
            x.exp()  # its result is freed at once, and the next one takes its place
            kept.append(x.exp())
        return kept

    assert measure(forward).bytes == 50 * BYTES


def test_measuring_keeps_nothing_alive() -> None:
    x = leaf()
    refs: list[weakref.ref] = []
    pointers = set()

    def forward() -> Tensor:
        out = x
        for _ in range(20):
            hidden = (x * 2).exp()
            refs.append(weakref.ref(hidden))
            pointers.add(hidden.data_ptr())
            del hidden
        return out.sum()

    retained = measure(forward)
    gc.collect()
    assert retained.bytes == 0
    assert all(ref() is None for ref in refs)


def test_backward_frees_what_was_retained() -> None:
    x = leaf()
    storages: list[weakref.ref] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            saved = x * 2
            storages.append(weakref.ref(saved.untyped_storage()))
            ctx.save_for_backward(saved)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    retained = measure(lambda: Watched.apply(x).sum())
    assert retained.bytes == BYTES
    retained.output.backward()
    assert torch.equal(x.grad, 2 * x)
    with pytest.raises(RuntimeError, match="second time"):
        retained.output.backward()


def test_an_output_that_is_saved_makes_no_cycle() -> None:
    x = leaf()
    retained = measure(lambda: x.exp())
    node = weakref.ref(retained.output)
    gc.disable()
    try:
        del retained
        assert node() is None, "the output must die by reference counting"
    finally:
        gc.enable()


def test_retain_graph() -> None:
    x = leaf()
    out = measure(lambda: x.exp().sum()).output
    out.backward(retain_graph=True)
    out.backward()
    assert torch.allclose(x.grad, 2 * x.exp())


def test_double_backward() -> None:
    x = leaf()
    out = measure(lambda: x.pow(3).sum()).output
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, 6 * x)


def test_a_change_in_place_is_noticed_as_without_measuring() -> None:
    x = leaf()
    hidden = x * 1
    retained = measure(lambda: hidden.square().sum())
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        retained.output.backward()


def test_in_place_operations_that_autograd_allows() -> None:
    x = leaf()
    retained = measure(lambda: torch.relu_(x * 2).sum())
    retained.output.backward()
    assert torch.equal(x.grad, 2.0 * (x > 0))


def test_the_table() -> None:
    x, y = leaf(), torch.randn((), dtype=torch.float64, requires_grad=True)
    text = str(measure(lambda: x.float() * x * y))
    lines = text.splitlines()
    assert lines[0].split() == ["bytes", "shape", "dtype", "uses"]
    assert "240  6 x 10  float32" in lines[1]
    assert "scalar" in text
    assert lines[-1].endswith("tensors")
    assert str(measure(lambda: 1)).splitlines()[-1] == "0 bytes retained in 0 tensors"


def test_what_is_not_callable() -> None:
    with pytest.raises(TypeError, match=r"fn must be callable, got Tensor; .*lambda"):
        measure(leaf())
    with pytest.raises(TypeError, match="exclude takes tensors"):
        measure(lambda: None, exclude=3)
    with pytest.raises(TypeError, match="exclude takes tensors"):
        measure(lambda: None, exclude=["weight"])
