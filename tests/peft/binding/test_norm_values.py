"""Norms of a bound model whose weights change, by every way there is: the gradient is stock PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from norm_classes import RMSNorm
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from safe_kernels.retention import measure
from safe_peft import bind, explain
from safe_peft.binding.blocks import norms
from safe_peft.binding.blocks.norms import MOST_READS

D = 8


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(D, D), norm, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x))).square().sum()


def make(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Net(norm), LoraConfig(target_modules=["a", "b"], init_lora_weights=False)).train()


def norm_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.norm


def gradient(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    model.zero_grad()
    model(torch.randn(4, D, generator=torch.Generator().manual_seed(1)).to(dtype)).backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def kept(model: nn.Module) -> int:
    return measure(lambda: model(torch.ones(4, D)), exclude=model).bytes


def small(weight: Tensor) -> Tensor:
    return torch.full_like(weight, 1e-30)


def through_data(norm: nn.Module) -> None:
    norm.weight.data.copy_(small(norm.weight))


def other_data(norm: nn.Module) -> None:
    norm.weight.data = small(norm.weight)


def a_zero(norm: nn.Module) -> None:
    norm.weight.data[3] = 0.0


def in_place(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.weight.mul_(1e-30)


def through_numpy(norm: nn.Module) -> None:
    norm.weight.detach().numpy()[:] = 1e-30


def from_a_vector(norm: nn.Module) -> None:
    vector = parameters_to_vector(norm.parameters()).detach()
    vector_to_parameters(vector * 1e-30, norm.parameters())


def through_a_kept_vector(norm: nn.Module) -> None:
    vector = parameters_to_vector(norm.parameters()).detach()
    vector_to_parameters(vector, norm.parameters())
    vector.mul_(1e-30)


def loaded(norm: nn.Module) -> None:
    norm.load_state_dict({**norm.state_dict(), "weight": small(norm.weight)})


def assigned(norm: nn.Module) -> None:
    norm.load_state_dict({**norm.state_dict(), "weight": nn.Parameter(small(norm.weight), False)}, assign=True)


def swapped(norm: nn.Module) -> None:
    torch.utils.swap_tensors(norm.weight, nn.Parameter(small(norm.weight), requires_grad=False))


def replaced(norm: nn.Module) -> None:
    norm.weight = nn.Parameter(small(norm.weight), requires_grad=False)


def averaged(norm: nn.Module) -> None:
    """What libraries of averages do: other values come in through .data, and go again."""
    average = AveragedModel(copy.deepcopy(norm))
    for mine, other in zip(norm.parameters(), average.module.parameters(), strict=True):
        mine.data.copy_(other.data * 1e-30)


WRITES = [
    through_data,
    other_data,
    a_zero,
    in_place,
    through_numpy,
    from_a_vector,
    through_a_kept_vector,
    loaded,
    assigned,
    swapped,
    replaced,
    averaged,
]
KINDS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(D),
    "rms": lambda: RMSNorm(D),
    "torch rms": lambda: nn.RMSNorm(D),
}


@pytest.fixture(params=["read at once", "reading waits"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU, and the CPU taken for a device that has to be waited for."""
    if request.param == "reading waits":
        monkeypatch.setattr(norms, "reading_waits", lambda tensor: True)
    return request.param


def assert_as_stock(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_became_tiny(kind: str, write: Callable[[nn.Module], None], device: str) -> None:
    if device == "reading waits" and write is through_numpy:
        pytest.skip("a GPU's memory is not NumPy's")
    model, stock = make(KINDS[kind]()), make(KINDS[kind]())
    with bind(model):
        assert_as_stock(gradient(model), gradient(stock))
        write(norm_of(model))
        write(norm_of(stock))
        assert_as_stock(gradient(model), gradient(stock))
        assert kept(model) <= kept(stock)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_half_precision(kind: str, device: str) -> None:
    """1e-6 is a normal number of float32 and none of float16."""
    found = []
    for bound in (True, False):
        model = make(KINDS[kind]())
        norm_of(model).weight.data.fill_(1e-6)
        if bound:
            with bind(model):
                gradient(model)
                found.append(gradient(model.half(), torch.float16))
        else:
            found.append(gradient(model.half(), torch.float16))
    assert found[0].isfinite().all()
    smallest = 2.0**-24  # such gradients are at the end of float16's range
    torch.testing.assert_close(
        found[0], found[1], rtol=0.02, atol=max(4 * smallest, 0.02 * float(found[1].abs().max()))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_served_again_once_the_weights_allow_it(kind: str, device: str) -> None:
    model = make(KINDS[kind]())
    with bind(model):
        usual = kept(model)
        norm_of(model).weight.data.fill_(0.0)
        assert kept(model) > usual
        norm_of(model).weight.data.fill_(1.0)
        assert kept(model) == usual


def test_weights_are_read_once_on_a_device_that_has_to_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "reading_waits", lambda tensor: True)
    reads = []
    monkeypatch.setattr(norms, "invertible", lambda *args: reads.append(1) or True)
    model = make(nn.LayerNorm(D))
    with bind(model):
        for _ in range(5):
            gradient(model)
        assert len(reads) == 1
        for _ in range(3 * MOST_READS):
            norm_of(model).weight.data.mul_(1.0)
            gradient(model)
        assert len(reads) == MOST_READS
        (part,) = [part for part in explain(model).parts if part.name == "norm"]
        assert "written to more than" in part.reason


def test_checkpointing_reads_them_once_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hooks make aliases of all that is saved, when the forward runs again."""
    monkeypatch.setattr(norms, "reading_waits", lambda tensor: True)
    reads = []
    monkeypatch.setattr(norms, "invertible", lambda *args: reads.append(1) or True)
    model, x = make(nn.LayerNorm(D)), torch.randn(4, D, requires_grad=True)
    with bind(model):
        for _ in range(5):
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).backward()
    assert len(reads) == 1


def test_memory_that_others_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "reading_waits", lambda tensor: True)
    model = make(nn.LayerNorm(D))
    alias = norm_of(model).weight.data
    with bind(model):
        (part,) = [part for part in explain(model).parts if part.name == "norm"]
        assert "share the memory" in part.reason
        del alias
        assert norm_of(model).__dict__["_safe_state"].retains_output(norm_of(model))


@pytest.mark.parametrize("zero", ["before it was compiled", "after it was compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_from_the_first_step(kind: str, zero: str) -> None:
    torch._dynamo.reset()
    model, stock = make(KINDS[kind]()), make(KINDS[kind]())
    with bind(model):
        compiled = torch.compile(model, backend="aot_eager")
        if zero == "after it was compiled":
            gradient(compiled)
        for other in (model, stock):
            norm_of(other).weight.data[0] = 0.0
        assert_as_stock(gradient(compiled), gradient(stock))


# ---------------------------------------------------------------- weights that are no longer the module's own


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def pruned(norm: nn.Module) -> None:
    prune.random_unstructured(norm, "weight", amount=0.5)


def parametrized(norm: nn.Module) -> None:
    parametrize.register_parametrization(norm, "weight", Doubled())


@pytest.mark.parametrize("change", [pruned, parametrized], ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ["before binding", "after binding"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_pruned_and_parametrized_weights(kind: str, when: str, change: Callable[[nn.Module], None]) -> None:
    model, stock = make(KINDS[kind]()), make(KINDS[kind]())

    def apply() -> None:
        for other in (model, stock):
            torch.manual_seed(3)
            change(norm_of(other))

    if when == "before binding":
        apply()
    with bind(model):
        if when == "after binding":
            apply()
        assert_as_stock(gradient(model), gradient(stock))


def test_a_weight_that_was_taken_away() -> None:
    model, stock = make(nn.LayerNorm(D)), make(nn.LayerNorm(D))
    with bind(model):
        for other in (model, stock):
            norm_of(other).weight = None
        assert_as_stock(gradient(model), gradient(stock))
