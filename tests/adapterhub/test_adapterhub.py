"""Bound models of AdapterHub's `adapters` compute what they compute without us, and retain no more.

`make matrix CORNERS=adapterhub` runs these tests: the package pins an older transformers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from blocks import retained
from tiny import EARLY, Rows, adamw, batches
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, TrainingArguments

import safe_peft
from safe_kernels.retention import measure
from safe_peft import AdapterFreezer, SafeConfig, bind, explain
from safe_peft.planning.inputs import Inputs
from safe_peft.planning.tracing import trace

logging.getLogger("adapters").setLevel(logging.ERROR)
ACTIVATION = "the activation is none of gelu, gelu_tanh, relu, silu"


def plain_bert() -> Any:
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **shape, **quiet))


def bert(config: str = "double_seq_bn", names: str = "one", **changes: Any) -> Any:
    """BERT with random adapters of these names; the first is active."""
    return adapted(plain_bert(), config, names, **changes)


def adapted(model: Any, config: str, names: str, **changes: Any) -> Any:
    adapters.init(model)
    for name in names.split():
        model.add_adapter(name, config=adapters.AdapterConfig.load(config, reduction_factor=4, **changes))
    model.train_adapter(names.split()[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.train()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return adapted(GPT2LMHeadModel(config), "double_seq_bn", "one")


def batch() -> dict[str, Tensor]:
    return next(batches(1, rows=4, length=8))


def loss(model: Any) -> Tensor:
    """A composition in parallel has more outputs than labels."""
    given = {name: value for name, value in batch().items() if name != "labels"}
    out: Tensor = model(**given).logits.float().pow(2).mean()
    return out


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    value = loss(model)
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), found


def kept(model: Any) -> int:
    return measure(lambda: loss(model), exclude=model).bytes


def assert_as_stock(make: Callable[[], Any], change: Callable[[Any], object] = lambda model: None) -> set[str]:
    """Compare a bound model with another one, and return the paths of its layers with their reasons."""
    stock, bound = make(), make()
    with bind(bound):
        change(stock)
        change(bound)
        expected, limit = loss_and_gradients(stock), kept(stock)
        got, found = loss_and_gradients(bound), kept(bound)
        paths = {f"{row.path} {row.reason}".strip() for row in explain(bound)}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert found <= limit
    return paths


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "houlsby": ({}, ""),
    "pfeiffer": ({"config": "seq_bn"}, ""),
    "parallel": ({"config": "par_bn"}, ""),
    "gelu": ({"non_linearity": "gelu"}, ""),
    "gelu_new": ({"non_linearity": "gelu_new"}, ""),
    "swish": ({"non_linearity": "swish", "config": "par_bn"}, ""),
    "scaled": ({"scaling": 2.5}, ""),
    "learned scaling": ({"scaling": "learned"}, ""),
    "scaling by channel": ({"scaling": "channel", "config": "par_bn"}, ""),
    "gate": ({"use_gating": True}, ""),
    "parallel gate": ({"use_gating": True, "config": "par_bn"}, ""),
    "norm before": ({"ln_before": True}, ""),
    "norm after": ({"ln_after": True, "adapter_residual_before_ln": False}, ""),
    "residual before norm after": ({"ln_after": True, "adapter_residual_before_ln": True}, ""),
    "original norm": ({"original_ln_before": True, "original_ln_after": False, "config": "seq_bn"}, ""),
    "residual": ({"residual_before_ln": False, "original_ln_before": True}, ""),
    "tanh": ({"non_linearity": "tanh"}, ACTIVATION),
    "leakyrelu": ({"non_linearity": "leakyrelu"}, ACTIVATION),
    "phm": ({"phm_layer": True, "phm_dim": 2}, "adapter is made of PHMLayer and PHMLayer, not of nn.Linear"),
}


@pytest.mark.parametrize("name", [*CONFIGS])
def test_every_configuration_computes_the_same(name: str) -> None:
    options, reason = CONFIGS[name]
    expected = f"adapters {reason}" if reason else "safe_kernels::bottleneck"
    assert assert_as_stock(lambda: bert(**options)) == {expected}


def test_a_decoder_computes_the_same() -> None:
    assert assert_as_stock(gpt2) == {"safe_kernels::bottleneck"}


def half(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".adapters." in name and "layer.1" in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize("config", ["double_seq_bn", "par_bn"])
@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_frozen_adapters_compute_the_same(config: str, kind: str) -> None:
    assert_as_stock(lambda: bert(config, non_linearity=kind), half)


COMPOSITIONS = {
    "stack": Stack("one", "two"),
    "parallel": Parallel("one", "two"),
    "split": Split("one", "two", splits=[3, 5]),
    "batch": BatchSplit("one", "two", batch_sizes=[1, 3]),
    "average": Average("one", "two", weights=[0.3, 0.7]),
    "nested": Stack("one", Parallel("two", "three")),
    "fuse": Fuse("one", "two"),
}


@pytest.mark.parametrize("name", [*COMPOSITIONS])
def test_every_composition_computes_the_same(name: str) -> None:
    setup = COMPOSITIONS[name]

    def make() -> Any:
        model = bert("seq_bn", "one two three")
        if name == "fuse":
            model.add_adapter_fusion(setup)
            model.train_adapter_fusion(setup)
        else:
            model.train_adapter(Stack(*sorted(setup.flatten())))
            model.set_active_adapters(setup)
        return model

    assert assert_as_stock(make) == {"safe_kernels::bottleneck"}


@pytest.mark.parametrize("config", ["seq_bn", "par_bn"])
def test_dropout_acts_on_what_the_op_gives(config: str) -> None:
    model = bert(config, dropout=0.5)
    with bind(model):
        assert loss(model).item() != loss(model).item()
        model.eval()
        expected = loss(model).item()
    assert loss(model).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", ["double_seq_bn", "par_bn"])
def test_autocast(config: str) -> None:
    stock, bound = bert(config), bert(config)
    with bind(bound), torch.autocast("cpu", torch.bfloat16):
        (_, expected), (_, got) = loss_and_gradients(stock), loss_and_gradients(bound)
        limit, found = kept(stock), kept(bound)
        x = torch.randn(2, 3, 32)
        layers = [model.bert.encoder.layer[0].output.adapters["one"] for model in (stock, bound)]
        assert len({(out.dtype, up.dtype) for layer in layers for out, _, up in [layer(x, x)]}) == 1
    for name, grad in expected.items():
        assert float((got[name] - grad).norm()) <= 0.05 * float(grad.norm()) + 1e-6, name
    assert found <= limit


def test_a_hook_on_the_layer_down_takes_their_code() -> None:
    calls: list[object] = []

    def hook(model: Any) -> None:
        layer = model.bert.encoder.layer[0].output.adapters["one"].adapter_down[0]
        layer.register_forward_hook(lambda *_: calls.append(1))

    paths = assert_as_stock(bert, hook)
    assert len(calls) == 4 and any("hooks on the layers of the adapter" in path for path in paths)


def test_the_files_are_theirs(tmp_path: Path) -> None:
    model = bert()
    model.save_adapter(tmp_path / "stock", "one")
    with bind(model):
        model.save_adapter(tmp_path / "bound", "one")
    for path in (tmp_path / "stock").iterdir():
        assert path.read_bytes() == (tmp_path / "bound" / path.name).read_bytes(), path.name


def features(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """What one adapter is added to, and the sum."""
    seen: dict[str, Tensor] = {}
    layer = model.get_submodule(name)

    def keep(module: Any, hidden: Tensor, given: Tensor, *rest: Any) -> Any:
        seen["base"], seen["output"] = given, given + hidden
        return type(module).post_forward(module, hidden, given, *rest)

    def call(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["base"], seen["output"] = kwargs["residual_input"], output[0]

    hook = layer.register_forward_hook(call, with_kwargs=True)
    if "Parallel" in type(layer).__name__:
        layer.post_forward = lambda *args: keep(layer, *args)
    loss(model)
    hook.remove()
    words = batch()["attention_mask"].bool()
    return seen["base"].detach()[words].double(), seen["output"].detach()[words].double()


def one_minus_cka(X: Tensor, Y: Tensor) -> float:
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return 1.0 - float((Y.T @ X).square().sum() / ((X.T @ X).norm() * (Y.T @ Y).norm()))


@pytest.mark.parametrize("config", ["double_seq_bn", "par_bn"])
def test_adapters_are_scored_by_their_features_and_frozen(config: str) -> None:
    model = bert(config)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"target_fraction": 0.5, "block_rows": 64}))
    expected = {a.name: one_minus_cka(*features(bert(config), a.name)) for a in freezer.adapters}
    for step, given in enumerate(batches(16, rows=4, length=8)):
        (loss(model) if step == 0 else model(**given).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert freezer.ledger.scorings[0].importance == pytest.approx(expected, rel=1e-3)
    assert min(expected.values()) > 1e-5
    assert 0 < len(freezer.frozen) < len(freezer.adapters)
    frozen = [adapter for adapter in freezer.adapters if adapter.name in freezer.frozen]
    model.train_adapter("one")  # sets requires_grad again
    model(**given).loss.backward()
    assert all(p.grad is None for adapter in frozen for p in adapter.parameters())
    assert retained(model, given) < retained(bert(config), given)
    freezer.detach()


@pytest.mark.parametrize("config", ["double_seq_bn", "par_bn"])
@pytest.mark.parametrize("frozen", [False, True])
def test_bytes_are_planned(config: str, frozen: bool) -> None:
    model, given = bert(config), batch()
    with bind(model) as binding:
        names = [adapter.name for adapter in binding.live_adapters()][: 2 * frozen]
        for adapter in binding.live_adapters():
            if adapter.name in names:
                adapter.freeze()
    planned = trace(model, Inputs.of(given), frozen=names)
    with bind(model):
        assert planned.retained == planned.table.bytes(names) == retained(model, given)


def test_the_block_of_the_docs_runs(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/bottleneck.md"
    (block,) = re.findall(r"```python adapterhub\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], save_strategy="no", use_cpu=True)
    names = {"safe_peft": safe_peft, "model": plain_bert(), "args": args, "data": Rows(32)}
    exec(compile(block, "block", "exec"), names)
    assert 0 < len(names["callback"].report().freezings) <= 4  # type: ignore[attr-defined]


def test_nothing_of_ours_is_left() -> None:
    model, given = bert(), batch()
    before = {name: type(module) for name, module in model.named_modules()}
    with bind(model) as binding:
        assert binding.live_adapters()[0].name == "bert.encoder.layer.0.attention.output.adapters.one"
        model(**given)
    assert before == {name: type(module) for name, module in model.named_modules()}
