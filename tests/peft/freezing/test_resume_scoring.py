"""A scoring step that was asked for and not made when the state was saved is made after the restart, as without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tiny import adamw, batches, bert, train

from safe_peft import AdapterFreezer, SafeConfig, ScoreError, StateError

OPTIONS = {"warmup": 2, "max_warmup": 4, "freeze_end": 12, "freeze_interval": 2, "score_interval": 4}
DATA = list(batches(14))


class Loop:
    """A raw loop whose optimizer does not step at some steps, as GradScaler has it where gradients are infinite."""

    def __init__(self, skipped: tuple[int, ...] = (), **options: Any) -> None:
        self.model, self.skipped, self.done = bert(layers=1), skipped, 0
        self.optimizer = adamw(self.model)
        config = SafeConfig(**OPTIONS | {"score": "gradient_sensitivity"} | options)
        self.freezer = AdapterFreezer(self.model, self.optimizer, config)

    def run(self, until: int) -> Loop:
        for step in range(self.done + 1, until + 1):
            self.model(**DATA[step - 1]).loss.backward()
            if step not in self.skipped:
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.freezer.step()
        self.done = until
        return self

    def restarted(self) -> Loop:
        """Another process's loop, with all that a checkpoint holds."""
        other = Loop(self.skipped)
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.freezer.load_state_dict(self.freezer.state_dict())
        other.done = self.done
        return other


@pytest.mark.parametrize("skipped", [(), (4,), (4, 5, 6), (12,)], ids=str)
def test_wherever_a_restart_is_the_ledger_is_that_of_the_run_that_went_on(skipped: tuple[int, ...]) -> None:
    loop, stopped = Loop(skipped), {}
    for stop in range(3, 14):
        stopped[stop] = loop.run(stop).restarted()
    whole = loop.run(14).freezer.ledger
    expected = [max([step, *(skip + 1 for skip in skipped if step in skipped)]) for step in (4, 8, 12)]
    assert [scoring.step for scoring in whole.scorings] == expected
    for stop, again in stopped.items():
        assert again.run(14).freezer.ledger == whole, stop


def test_what_was_not_finite_stops_the_training_after_a_restart_too() -> None:
    loop = Loop(on_nonfinite="raise").run(3)
    loop.model(**DATA[3]).loss.backward()
    loop.freezer.adapters[2].parameters()[0].grad.fill_(float("nan"))
    loop.optimizer.step()
    again = Loop(on_nonfinite="raise")
    again.freezer.load_state_dict(loop.freezer.state_dict())
    with pytest.raises(ScoreError, match="NaN or Inf in the gradient of lora_A"):
        again.freezer.step()


def test_evidence_is_that_of_the_process_that_saved_it() -> None:
    """All processes may go on from one state, but for what one of them alone has seen of a step."""
    loop = Loop(score="cka").run(3)
    between = {**loop.freezer.state_dict()}
    between["evidence"] = {**between["evidence"], "process": 1}
    Loop(score="cka").freezer.load_state_dict(between)
    loop.model(**DATA[3])
    state = loop.freezer.state_dict()
    state["evidence"] = {**state["evidence"], "process": 1}
    other = Loop(score="cka")
    with pytest.raises(StateError, match="saved by process 1 within a step that is scored, and here is process 0"):
        other.freezer.load_state_dict(state)
    train(other.model, other.optimizer, iter(DATA[:4]), other.freezer)
    assert [scoring.step for scoring in other.freezer.ledger.scorings] == [4]
