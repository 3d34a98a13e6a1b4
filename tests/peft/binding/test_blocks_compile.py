"""A bound model compiles whole, and gives the same loss and gradients."""

from __future__ import annotations

import pytest
import torch
from blocks import error, loss_and_gradients
from families import family

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
