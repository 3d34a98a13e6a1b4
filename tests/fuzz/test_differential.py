"""Whole models, bound and not, run the same programs: losses, gradients, errors and retained bytes are stock PEFT's."""

from __future__ import annotations

from case import Case, sensible
from compare import run
from hypothesis import Phase, given, settings
from search import QUIET, Failure, cases, simplest


@settings(QUIET, max_examples=60, derandomize=True, phases=[Phase.generate, Phase.shrink])
@given(cases())
def test_a_bound_model_does_what_stock_peft_does(case: Case) -> None:
    assert run(case) == [], f"{case!r}: `make fuzz` looks for more like it"


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
