"""Whole models, bound and not, run the same programs: losses, gradients, errors and retained bytes are stock PEFT's."""

from __future__ import annotations

import pytest
from case import Case, sensible
from compare import run
from hypothesis import Phase, given, settings
from search import QUIET, Failure, cases, simplest


@settings(QUIET, max_examples=30, derandomize=True, phases=[Phase.generate, Phase.shrink])
@given(cases())
def test_a_bound_model_does_what_stock_peft_does(case: Case) -> None:
    assert run(case) == [], f"{case!r}: `make fuzz` looks for more like it"


FOUND = [
    Case(family="mpnet", trains="one"),
    Case(family="mpnet", trains="random"),
    Case(recompute=True, trains="embeddings", change="global hook", when="between", calls="disabled"),
    Case(recompute=True, trains="embeddings", change="prune", when="between", calls="disabled"),
    Case(trains="one", change="half and back", when="between", calls="two"),
    Case(input_grads=True, targets="head too", hook="backward pre", spot="layer", high=True, calls="disabled"),
    Case(recompute=True, hook="input data", embeds="leaf", calls="disabled"),
    Case(targets="head too", hook="input data", spot="layer", high=True),
    Case(family="falcon", checkpointing="non-reentrant", hook="input in place", spot="mlp"),
    Case(precision="autocast", compiled=True),
    Case(hook="data", spot="act", embeds="fresh"),
    Case(family="gemma3", targets="attention", parts="norms", hook="record"),
    Case(family="whisper", precision="autocast", adapter="dora", hook="record"),
    Case(family="starcoder2", padding="left", hook="vector", spot="embeddings", entry="backbone"),
    Case(recompute=True, trains="alternate", high=True, change="norm zero", when="between", calls="two"),
    Case(family="t5", precision="autocast", trains="alternate", asks="attentions"),
    Case(family="whisper", targets="convolutions too", precision="autocast", adapter="dropout", hook="backward"),
    Case(family="vit", targets="convolutions too", precision="bf16", trains="lora_B", input_grads=True),
    Case(family="qwen3-moe", targets="experts too", precision="autocast", calls="two", asks="router"),
    Case(family="mixtral", targets="experts too", trains="top", checkpointing="non-reentrant", padding="right"),
]
"""What a search has found, of kinds that the few cases above may miss."""


@pytest.mark.parametrize("case", FOUND, ids=repr)
def test_what_a_search_has_found(case: Case) -> None:
    assert run(case) == []


def test_a_failing_case_is_made_simple() -> None:
    drawn = sensible(Case(family="gpt2", trains="bottom", adapter="dora", calls="two", precision="bf16"))

    def check(case: Case) -> list[str]:
        return ["bytes: more"] if case.adapter == "dora" and case.calls == "two" else []

    failure = simplest(Failure(drawn, tuple(check(drawn))), check)
    assert repr(failure.case) == "Case(adapter='dora', calls='two')"
    assert failure.covers(drawn, frozenset({"bytes"})) and not failure.covers(drawn, frozenset({"error"}))


def test_a_case_prints_as_python_that_makes_it() -> None:
    case = Case(family="t5", cache="default", hook="in place", spot="norm", layers=3)
    assert eval(repr(case)) == case
