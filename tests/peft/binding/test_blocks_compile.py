"""Bound models and blocks compile, give the same loss and gradients, and recompute activations."""

from __future__ import annotations

import pytest
import torch
from blocks import error, loss_and_gradients, retained
from families import LENGTH, ROWS, D, F, family

from safe_peft import bind


@pytest.mark.parametrize(("name", "layers"), [("llama", 2), ("bert", 1), ("mpnet", 1)])
def test_a_bound_model_compiles_without_a_graph_break(name: str, layers: int) -> None:
    one = family(name)
    model, batch = one.model(layers), one.batch()
    loss, grads = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    with bind(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        own_loss, own_grads = loss_and_gradients(compiled, batch)
    assert error(own_loss, loss) <= 1e-6
    for path, grad in own_grads.items():
        assert error(grad, grads[path.removeprefix("_orig_mod.")]) <= 2e-5, path
    assert len(own_grads) == len(grads)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_blocks_recompute_the_activation(name: str) -> None:
    """A compiler merges equal calls: it would retain the activation's output if backward's call were forward's."""
    one = family(name)
    model, batch = one.model(1), one.batch()
    torch._dynamo.reset()
    with bind(model) as binding:
        uncompiled = retained(model, batch)
        block = next(module for path, module in model.named_modules() if path.endswith(binding.blocks[0]))
        block.compile(backend="aot_eager", fullgraph=True)
        more = retained(model, batch) - uncompiled
    assert 0 <= more <= ROWS * LENGTH * (D + 1) * 4  # a compiled norm retains its input, and a LayerNorm the mean
    assert (D + 1) < F
