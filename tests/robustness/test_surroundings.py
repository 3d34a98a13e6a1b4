"""A bound model in whose middle something raises: it comes out, nothing is kept, and the next step is right."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from blocks import freeze_block
from failing import Boom, boom, interrupt
from families import family
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from tiny import EARLY, adamw, batches, bert, causal_batches, gpt2
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from safe_peft import AdapterFreezer, SafeConfig, bind


def at_call(number: int, fail: Callable[..., None]) -> Callable[..., None]:
    """A hook that fails once: modules of a frozen block run a second time, in its backward."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(0)
        if len(calls) == number:
            fail()

    return hook


@functools.cache
def bound(name: str) -> tuple[nn.Module, dict[str, Any], tuple[Tensor, ...]]:
    """Two blocks, of which one trains, and one is frozen and runs again in backward; and what a step of it gives."""
    one = family(name)
    model = one.model(layers=2, p=0.1, lora_dropout=0.1)
    binding = bind(model)
    freeze_block(model, binding.blocks[1])
    binding.recompute.update(binding.blocks[1:])
    return model, one.batch(), step(model, one.batch())


def step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """The loss, every gradient, and the random numbers that would come next."""
    torch.manual_seed(7)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return loss.detach(), *grads, torch.get_rng_state()


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def watched(model: nn.Module) -> tuple[list[StorageWeakRef], list[Any]]:
    """The storages of all that blocks and embeddings return, and the hooks that note them."""
    seen: list[StorageWeakRef] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        seen.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

    modules = [module for module in model.modules() if not list(module.children()) or isinstance(module, nn.ModuleList)]
    return seen, [module.register_forward_hook(note) for module in modules if "lora" not in str(type(module))]


def assert_gone(seen: list[StorageWeakRef]) -> None:
    if not all(storage.expired() for storage in seen):
        gc.collect()
    assert all(storage.expired() for storage in seen), "what the failed step retained"


REGISTER: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward pre-hook": lambda module, hook: module.register_forward_pre_hook(hook),
    "forward hook": lambda module, hook: module.register_forward_hook(hook),
    "backward pre-hook": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "backward hook": lambda module, hook: module.register_full_backward_hook(hook),
}


@given(st.data())
def test_wherever_a_hook_raises_the_next_step_is_what_it_would_have_been(data: Any) -> None:
    model, batch, expected = bound(data.draw(st.sampled_from(["bert", "llama"])))
    modules = [module for module in model.modules() if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    module = data.draw(st.sampled_from(range(len(modules))))
    kind = data.draw(st.sampled_from(sorted(REGISTER)))
    fail = data.draw(st.sampled_from([boom, interrupt]))
    when = data.draw(st.sampled_from([1, 2]))
    tasks: list[int] = []

    def failing(*_: Any) -> None:
        tasks.append(torch._C._current_graph_task_id())
        fail()

    handle = REGISTER[kind](modules[module], at_call(when, failing))
    seen, notes = watched(model)
    try:
        step(model, batch)  # a hook of a module that is not run, or is run once, raises nothing
    except (Boom, KeyboardInterrupt):
        pass
    finally:
        for one in (handle, *notes):
            one.remove()
    if tasks in ([], [-1]):  # else in backward: what was ready to run stays in PyTorch's queue until the next one
        assert_gone(seen)
    assert same(step(model, batch), expected)
    assert_gone(seen)


def test_a_batch_that_failed_and_is_tried_again_scores_as_if_it_had_not() -> None:
    runs = []
    for fails in (False, True):
        model = bert()
        optimizer = adamw(model)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
        for number, batch in enumerate(batches(16)):
            if fails and number % 3 == 0:
                handle = model.base_model.model.classifier.register_forward_pre_hook(boom)
                with pytest.raises(Boom):
                    model(**batch)
                handle.remove()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
        runs.append((freezer.frozen, list(freezer.ledger.importance.values())))
    assert runs[0][0] == runs[1][0]
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-9)


def two_adapters() -> PeftModel:
    model = gpt2()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("fail", [boom, interrupt])
def test_a_forward_observed_on_pefts_own_path_that_fails_leaves_no_hook_and_no_switch(
    fail: Any, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_adapters()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**{**EARLY, "warmup": 1}))
    (batch,) = causal_batches(1)
    layer = freezer.adapters[0].layer
    layer.lora_A["second"].register_forward_hook(lambda *call: None)  # the fast path would not run it
    fails, kind = at_call(when, fail), type(layer.base_layer)  # first all adapters together, then each alone
    real = kind.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if self is layer.base_layer:
            fails()
        return real(self, x)

    with monkeypatch.context() as patched, pytest.raises((Boom, KeyboardInterrupt)):
        patched.setattr(kind, "forward", forward)
        model(**batch)
    assert not layer.base_layer._forward_hooks
    assert layer.active_adapters == ["default", "second"]
    assert all(adapter.key in adapter.state.observe for adapter in freezer.adapters if adapter.state is not None)
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for adapter in freezer.adapters for parameter in adapter.parameters())


# ---------------------------------------------------------------- threads, and changes after forward


def test_gradients_of_many_threads_over_one_bound_model_add_up() -> None:
    model = bert(layers=1)
    data = list(batches(8))
    for batch in data:
        model(**batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    start = threading.Barrier(4)

    def work(index: int) -> None:
        start.wait(60)
        for batch in data[index::4]:
            model(**batch).loss.backward()

    with bind(model), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    got = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def detached(freezer: AdapterFreezer) -> None:
    freezer.detach()


def stepped(freezer: AdapterFreezer) -> None:
    freezer.step()


@pytest.mark.parametrize("change", [detached, stepped])
def test_a_graph_outlives_what_is_done_to_the_freezer_after_forward(change: Callable[[AdapterFreezer], None]) -> None:
    results = []
    for changes in (False, True):
        model = bert(layers=1)
        freezer = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
        loss = model(**next(batches(1))).loss
        if changes:
            change(freezer)
        loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def doubled(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].data.mul_(2.0)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_hook_that_writes_into_an_adapters_input_past_every_version_is_heeded(name: str) -> None:
    """What an MLP's last layer reads may be made again in backward, but not once somebody has written into it."""
    results = []
    for binds in (False, True):
        model = family(name).model(layers=1)
        if binds:
            bind(model)
        paths = [path for path, _ in model.named_modules() if path.endswith(("mlp.down_proj", "0.output.dense"))]
        for path in paths:
            model.get_submodule(path).register_forward_pre_hook(doubled)
        model(**family(name).batch()).loss.backward()
        results.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    assert paths and any(paths[0] in name for name in results[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
