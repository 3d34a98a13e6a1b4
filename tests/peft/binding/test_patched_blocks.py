"""A bound block runs the forward that its class has now, also where transformers wraps it for every subclass."""

from __future__ import annotations

from typing import Any

import pytest
from families import family
from torch import Tensor, nn

from safe_peft import bind
from safe_peft.binding.class_swap import original_type


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def doubled(out: Any) -> Any:
    return out * 2 if isinstance(out, Tensor) else (out[0] * 2, *out[1:])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_a_patched_block(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = family(name)
    model, batch = one.model(), one.batch()
    with bind(one.model()):
        pass  # the class of bound blocks is made once, and here before the patch
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    unpatched = loss_and_gradients(model, batch)
    with bind(model) as binding:
        for cls in {original_type(model.base_model.model.get_submodule(block)) for block in binding.blocks}:
            own = cls.forward
            monkeypatch.setattr(cls, "forward", lambda *args, own=own, **kwargs: doubled(own(*args, **kwargs)))
        ours = loss_and_gradients(model, batch)
    stock = loss_and_gradients(model, batch)
    assert abs(stock["loss"] - unpatched["loss"]) > 1e-6
    assert set(ours) == set(stock)
    for path, value in stock.items():
        assert (ours[path] - value).abs().max() <= 2e-5 * value.abs().max(), path
