"""The cut moves only what `enable_input_require_grads` made a leaf; every other leaf, and every hook, is the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import error, frozen_prefix, retained
from families import Family, family
from oracle import taking_turns
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safe_kernels.retention import measure
from safe_peft import bind

FAMILIES = [family(name) for name in ("llama", "gpt2", "bert", "t5")]


def embeddings_of(one: Family, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What the user looks up, and the rest of the batch for a call with it."""
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    return model.get_input_embeddings()(batch["input_ids"]), rest


def both(model: nn.Module, compute: Callable[[], Any]) -> tuple[Any, Any]:
    stock = compute()
    model.zero_grad()
    with bind(model):
        return stock, compute()


def close(ours: Tensor | None, stock: Tensor | None) -> None:
    assert stock is not None
    assert ours is not None
    assert stock.abs().max() > 0
    assert (ours - stock).abs().max() <= 2e-5 * stock.abs().max()


LOOKED_UP = ("requires_grad_", "detached", "retain_grad", "autograd.grad", "noise")


@pytest.mark.parametrize(("one", "how", "switched_on"), taking_turns(FAMILIES, LOOKED_UP, (False, True)), ids=str)
def test_embeddings_that_the_user_looked_up_are_the_users(one: Family, how: str, switched_on: bool) -> None:
    model, batch = frozen_prefix(one)
    if switched_on:
        model.enable_input_require_grads()

    def compute() -> Tensor | None:
        embeds, rest = embeddings_of(one, model, batch)
        if how == "detached":
            embeds = embeds.detach()
        embeds.requires_grad_()
        given = embeds + 0.01 if how in ("noise", "retain_grad") else embeds
        if how == "retain_grad":
            given.retain_grad()
        loss = model(inputs_embeds=given, **rest).loss
        if how == "autograd.grad":
            return torch.autograd.grad(loss, embeds)[0]
        loss.backward()
        return given.grad if how == "retain_grad" else embeds.grad

    stock, ours = both(model, compute)
    close(ours, stock)


@pytest.mark.parametrize("switched_on", [False, True], ids=["plain", "enable_input_require_grads"])
@pytest.mark.parametrize("one", FAMILIES[:3], ids=str)
def test_a_leaf_that_a_hook_of_the_user_made_is_the_users(one: Family, switched_on: bool) -> None:
    model, batch = frozen_prefix(one)
    if switched_on:
        model.enable_input_require_grads()
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output.requires_grad_())

    model.get_input_embeddings().register_forward_hook(hook)

    def compute() -> Tensor | None:
        seen.clear()
        model(**batch).loss.backward()
        return seen[0].grad

    stock, ours = both(model, compute)
    close(ours, stock)


@pytest.mark.parametrize("where", ["lowest block", "inside it", "first live block", "embeddings", "all modules"])
@pytest.mark.parametrize("one", [family(name) for name in ("llama", "gpt2", "vit")], ids=str)
def test_backward_hooks_below_the_cut_fire_as_in_stock(one: Family, where: str) -> None:
    model, batch = frozen_prefix(one)
    model.enable_input_require_grads()
    with bind(model) as binding:
        modules = dict(model.named_modules())
        blocks = [modules[f"base_model.model.{name}"] for name in binding.blocks]
    order: list[list[Any]] = []

    def hook(module: nn.Module, grads: Any, outputs: Any) -> None:
        order.append(["hook", *(None if grad is None else float(grad.double().norm()) for grad in grads)])

    if where == "all modules":
        handle = nn.modules.module.register_module_full_backward_hook(hook)
    else:
        inside = next(iter(blocks[0].children()))
        places = {"lowest block": blocks[0], "inside it": inside, "first live block": blocks[-1]}
        places["embeddings"] = model.get_input_embeddings()
        handle = places[where].register_full_backward_hook(hook)
    live = next(p for p in model.parameters() if p.requires_grad)
    other = live.register_post_accumulate_grad_hook(lambda p: order.append(["adapter"]))

    def compute() -> list[Any]:
        order.clear()
        model(**batch).loss.backward()
        return list(order)

    try:
        stock, ours = both(model, compute)
    finally:
        handle.remove()
        other.remove()
    kinds = [[one[0], *(value is None for value in one[1:])] for one in ours]
    assert kinds == [[one[0], *(value is None for value in one[1:])] for one in stock], "the same, in the same order"
    for mine, theirs in zip(ours, stock, strict=True):
        assert [m for m in mine[1:] if m is not None] == pytest.approx(
            [t for t in theirs[1:] if t is not None], rel=1e-4
        )


@pytest.mark.parametrize("one", FAMILIES[:3], ids=str)
def test_hidden_states_that_the_caller_asked_for_have_their_gradient(one: Family) -> None:
    model, batch = frozen_prefix(one)
    model.enable_input_require_grads()

    def compute() -> Tensor:
        output = model(**batch, output_hidden_states=True)
        return torch.autograd.grad(output.loss, output.hidden_states[0])[0]

    stock, ours = both(model, compute)
    close(ours, stock)


@pytest.mark.parametrize("one", FAMILIES, ids=str)
def test_noise_on_the_embeddings_keeps_the_cut(one: Family) -> None:
    """As NEFTune puts it there, by a hook."""
    model, batch = frozen_prefix(one)
    with bind(model):
        expected = retained(model, batch)
        model.enable_input_require_grads()
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + torch.zeros_like(out))
        assert retained(model, batch) == expected


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
def test_checkpointing_keeps_the_cut(noise: bool, reentrant: bool) -> None:
    model, batch = frozen_prefix(family("llama"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if noise:
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + torch.zeros_like(out))
    stock = retained(model, batch)
    runs: list[int] = []

    def count(*_: object) -> None:
        runs.append(1)

    count.__module__ = "accelerate.hooks"  # a hook of a library's own asks for no gradient
    model.base_model.model.model.layers[0].mlp.register_forward_hook(count)
    with bind(model):
        assert retained(model, batch) < stock
        runs.clear()
        model(**batch).loss.backward()
    assert len(runs) == 1, "a frozen prefix is not run again"


@pytest.mark.parametrize("way", ["hook on the output", "retain_grad"])
@pytest.mark.parametrize("place", ["", "mlp", "mlp.act_fn", "self_attn.q_proj", "input_layernorm"])
def test_what_a_forward_hook_asks_for_below_the_cut(place: str, way: str) -> None:
    model, batch = frozen_prefix(family("llama"))
    model.enable_input_require_grads()
    found: list[Tensor] = []

    def ask(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        tensor = out if isinstance(out, Tensor) else out[0]
        if not tensor.requires_grad:
            return
        if way == "retain_grad":
            tensor.retain_grad()
            found.append(tensor)
        else:
            tensor.register_hook(found.append)

    def asked() -> Tensor:
        found.clear()
        model(**batch).loss.backward()
        (one,) = found
        gradient = one.grad if way == "retain_grad" else one
        assert gradient is not None
        return gradient

    model.base_model.model.model.layers[0].get_submodule(place).register_forward_hook(ask)
    expected = asked()
    with bind(model):
        assert error(asked(), expected) <= 2e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_activated_lora_trains_under_checkpointing(reentrant: bool) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7], init_lora_weights=False
    )
    one, grads = family("llama"), []
    for bound in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(one.make(2, 0.0), config).train()
        if bound:
            bind(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        ids = one.batch()["input_ids"].clone()
        ids[:, 4] = 7
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all((grads[0][n] - grads[1][n]).abs().max() <= 2e-5 * grads[0][n].abs().max() for n in grads[0])


# ---------------------------------------------------------------- checkpointing of other libraries' making


class Unet(nn.Module):
    """Blocks that checkpoint a part of themselves, by whatever function they are given, as diffusers' do."""

    class Block(nn.Module):
        gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.pre, self.norm, self.lin = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)

        def inner(self, x: Tensor) -> Tensor:
            return torch.tanh(self.norm(torch.tanh(self.pre(x))))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self._gradient_checkpointing_func(self.inner, x)
            return hidden + self.lin(hidden)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Unet.Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("targets", [["lin"], ["pre", "lin"]], ids=["outside", "inside"])
@pytest.mark.parametrize(
    "function",
    [
        lambda module, *args: checkpoint(module, *args, use_reentrant=False),
        functools.partial(checkpoint, use_reentrant=False),
        lambda module, *args: checkpoint(module, *args, use_reentrant=True),
    ],
    ids=["function", "partial", "reentrant"],
)
def test_no_more_than_stock_whatever_function_checkpoints(
    function: Any, targets: list[str], request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Unet(), LoraConfig(target_modules=targets, init_lora_weights=False)).train()
    for block in model.base_model.model.blocks:
        block._gradient_checkpointing_func = function
    x, sizes, runs = torch.randn(64, 32), [], []
    model.base_model.model.blocks[0].pre.register_forward_hook(lambda *_: runs.append(1))

    def compute() -> int:
        runs.clear()
        return measure(lambda: model(x).sum(), exclude=[model, x]).bytes

    stock, ours = both(model, compute)
    sizes = (stock, ours)
    if targets == ["lin"]:
        assert sizes[1] <= sizes[0]
    with bind(model):
        runs.clear()
        model(x).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not trained
    if targets == ["lin"] and not request.node.name.endswith("[reentrant-outside]"):
        assert len(runs) == 1
