"""What was recognised once may change later: each change is noticed, and stock's code runs with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocks import error, loss_and_gradients
from families import family
from oracle import taking_turns
from owners_of_code import NAMES, owners
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from safe_peft import bind, explain
from safe_peft.binding.class_swap import original_type

CHILDREN = ("act_fn", "act", "activation_fn", "intermediate_act_fn")
Change = Callable[[nn.Module], None]


def assert_as_stock(name: str, change: Change, undo: Change | None = None, *, lora_dropout: float = 0.0) -> None:
    """Change a bound model, and compare with the same model unbound."""
    one = family(name)
    model, batch = one.model(lora_dropout=lora_dropout), one.batch()
    before, before_grads = loss_and_gradients(model, batch)
    with bind(model):
        torch.manual_seed(3)
        loss_and_gradients(model, batch)
        change(model)
        torch.manual_seed(3)
        loss, grads = loss_and_gradients(model, batch)
        if undo is not None:
            undo(model)
            assert error(loss_and_gradients(model, batch)[0], before) <= 1e-6, "as it was before the change"
            change(model)
    torch.manual_seed(3)
    stock_loss, stock_grads = loss_and_gradients(model, batch)
    assert max(error(grad, before_grads[path]) for path, grad in stock_grads.items()) > 1e-2, "a change that matters"
    assert error(loss, stock_loss) <= 1e-6
    assert grads.keys() == stock_grads.keys()
    for path, grad in stock_grads.items():
        assert float((grads[path] - grad).abs().max()) <= 2e-5 * float(grad.abs().max()), path


def activations(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        yield from ((module, name) for name in CHILDREN if name in module._modules)


# ---------------------------------------------------------------- children and their attributes


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mpnet"])
@pytest.mark.parametrize("other", [nn.Tanh(), nn.GELU(approximate="tanh")], ids=str)
def test_an_exchanged_activation(name: str, other: nn.Module) -> None:
    before: list[nn.Module] = []

    def change(model: nn.Module) -> None:
        for parent, child in activations(model):
            before.append(parent._modules[child])
            setattr(parent, child, other)

    def undo(model: nn.Module) -> None:
        for parent, child in activations(model):
            setattr(parent, child, before.pop(0))

    if type(other).__name__ in str([type(p._modules[c]).__name__ for p, c in activations(family(name).model())]):
        pytest.skip("the model's own")
    assert_as_stock(name, change, undo)


class Scaled(nn.Module):
    """An activation that reads what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * self.factor


class Boxed(Scaled):
    """What it reads may change without the attribute being set."""

    def __init__(self) -> None:
        super().__init__()
        self.box = [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * self.box[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    ("activation", "change"),
    [
        (lambda: nn.GELU(), lambda act: setattr(act, "approximate", "tanh")),
        (lambda: nn.GELU(approximate="tanh"), lambda act: setattr(act, "approximate", "none")),
        (lambda: nn.LeakyReLU(0.0), lambda act: setattr(act, "negative_slope", 0.5)),
        (lambda: nn.Hardtanh(0.0, float("inf")), lambda act: setattr(act, "max_val", 0.01)),
        (Scaled, lambda act: setattr(act, "factor", 2.0)),
        (Boxed, lambda act: act.box.__setitem__(0, 2.0)),
    ],
    ids=["gelu", "gelu-tanh", "slope", "bounds", "own", "within"],
)
def test_an_activations_attribute(
    name: str, activation: Callable[[], nn.Module], change: Callable[[nn.Module], None]
) -> None:
    one = family(name)
    model, batch = one.model(), one.batch()
    for parent, child in activations(model):
        setattr(parent, child, activation())
    with bind(model):
        loss_and_gradients(model, batch)
        for parent, child in activations(model):
            change(parent._modules[child])  # type: ignore[arg-type]
        loss, grads = loss_and_gradients(model, batch)
    stock_loss, stock_grads = loss_and_gradients(model, batch)
    assert error(loss, stock_loss) <= 1e-6
    for path, grad in stock_grads.items():
        assert error(grads[path], grad) <= 2e-5, path


def test_what_has_changed_is_named() -> None:
    model = family("llama").model()
    mlp, other = owners(model, "LlamaMLP")
    with bind(model):
        mlp.act_fn = nn.Tanh()
        other.act_fn.forward = torch.tanh
        paths = {part.name: (part.path, part.reason) for part in explain(model).parts}
        assert paths["model.layers.0.mlp"] == ("unchanged", "act_fn: Tanh has taken the place of SiLUActivation")
        assert paths["model.layers.1.mlp"] == ("unchanged", "act_fn: SiLUActivation.forward is replaced")


# ---------------------------------------------------------------- methods


def doubled(method: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = method(self, *args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    return forward


def counting(cls: Any, calls: list[type], *, wrong: bool) -> Callable[..., Any]:
    own = doubled(cls.forward) if wrong else cls.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(cls)
        return own(*args, **kwargs)

    return forward


CLASSES = [
    ("llama", "LlamaMLP"),
    ("llama", "SiLUActivation"),
    ("llama", "Linear"),
    ("bert", "GELUActivation"),
    ("bert", "Linear"),
    ("gpt2", "NewGELUActivation"),
    ("gpt2", "Dropout"),
    ("t5", "T5DenseActDense"),
    ("t5-gated", "T5DenseGatedActDense"),
    ("t5", "ReLU"),
    ("t5", "Dropout"),
    ("mpnet", "MPNetSelfAttention"),
    ("mpnet", "Dropout"),
]


@pytest.mark.parametrize(("name", "kind"), CLASSES)
@pytest.mark.parametrize("early", [False, True])
def test_a_patched_class(name: str, kind: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the model was bound, or before: what wraps a class's own forward and computes the same may do more."""
    one = family(name)
    model, batch = one.model(), one.batch()
    classes = {original_type(module) for module in owners(model, kind)}
    assert classes
    calls: list[type] = []

    def patch() -> None:
        for cls in classes:
            monkeypatch.setattr(cls, "forward", counting(cls, calls, wrong=not early))

    if early:
        patch()
    with bind(model):
        if not early:
            loss_and_gradients(model, batch)
            patch()
        calls.clear()
        loss, grads = loss_and_gradients(model, batch)
        ours = len(calls)
        reasons = {row.reason for row in (*explain(model).layers, *explain(model).parts)}
    calls.clear()
    stock_loss, stock_grads = loss_and_gradients(model, batch)
    assert ours == len(calls) > 0
    assert any("forward is replaced" in reason for reason in reasons)
    assert error(loss, stock_loss) <= 1e-6
    for path, grad in stock_grads.items():
        assert error(grads[path], grad) <= 2e-5, path


@pytest.mark.parametrize("method", ["forward", "_cast_input_dtype", "__call__"])
@pytest.mark.parametrize("early", [False, True])
def test_a_patched_adapter_layer(method: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = getattr(LoraLinear, method), []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return own(*args, **kwargs)

    one = family("llama")
    model, batch = one.model(), one.batch()
    if early:
        monkeypatch.setattr(LoraLinear, method, patched)
    with bind(model):
        loss_and_gradients(model, batch)
        monkeypatch.setattr(LoraLinear, method, patched)
        calls.clear()
        loss_and_gradients(model, batch)
        assert len(calls) == 14
        assert {row.reason for row in explain(model)} == {f"Linear.{method} is replaced"}
        monkeypatch.undo()
        assert {row.path for row in explain(model)} == {"safe_kernels::lora" if early else "safe_kernels::lora_linear"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "layers.0.mlp"),
        ("llama", "layers.0.mlp.act_fn"),
        ("llama", "layers.0.mlp.up_proj"),
        ("llama", "layers.0.mlp.up_proj.lora_A.default"),
        ("llama", "layers.0.mlp.up_proj.lora_B.default"),
        ("llama", "layers.0.mlp.up_proj.lora_dropout.default"),
        ("llama", "layers.0.mlp.up_proj.base_layer"),
        ("bert", "layer.0.intermediate.intermediate_act_fn"),
        ("gpt2", "h.0.mlp.act"),
        ("gpt2", "h.0.mlp.dropout"),
        ("t5", "block.0.layer.1.DenseReluDense.act"),
        ("t5", "block.0.layer.1.DenseReluDense.dropout"),
        ("mpnet", "layer.0.attention.attn"),
        ("mpnet", "layer.0.attention.attn.dropout"),
    ],
)
def test_a_replaced_forward(name: str, path: str) -> None:
    def change(model: nn.Module) -> None:
        module = next(module for full, module in model.named_modules() if full.endswith(path))
        own = module.forward
        module.forward = lambda *args, **kwargs: doubled(lambda _, *a, **k: own(*a, **k))(None, *args, **kwargs)

    assert_as_stock(name, change)


# ---------------------------------------------------------------- pruned and parametrised


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


@pytest.mark.parametrize(
    ("name", "path", "how", "early"),
    taking_turns(
        ("llama", "bert", "gpt2"),
        ("lora_A.default", "lora_B.default", "base_layer"),
        ("prune", "parametrize"),
        (False, True),
    ),
)
def test_pruned_and_parametrised_layers(name: str, path: str, how: str, early: bool) -> None:
    one = family(name)
    model, batch = one.model(), one.batch()

    def change() -> None:
        for module in [m.get_submodule(path) for m in model.modules() if isinstance(m, LoraLinear)]:
            if how == "prune":
                prune.l1_unstructured(module, "weight", amount=0.5)
            else:
                parametrize.register_parametrization(module, "weight", Halved())

    if early:
        change()
    with bind(model):
        loss_and_gradients(model, batch)
        if not early:
            change()
        loss, grads = loss_and_gradients(model, batch)
    stock_loss, stock_grads = loss_and_gradients(model, batch)
    assert error(loss, stock_loss) <= 1e-6 and grads.keys() == stock_grads.keys()
    for key, grad in stock_grads.items():
        assert error(grads[key], grad) <= 2e-5, key
