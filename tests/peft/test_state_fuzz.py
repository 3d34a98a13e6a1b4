"""Whatever a state or report file holds, loading it works or is refused by a typed error, and then changes nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from killed import RawLoop
from tiny import adamw, bert
from transformers import TrainerControl, TrainerState, TrainingArguments

from safe_peft import AdapterFreezer, ConfigError, FreezeReport, SafeCallback, SafeConfig, SafeError, StateError
from safe_peft.files.checksum import signed

few = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
MICRO = 13
CONFIG = SafeConfig(
    warmup=2,
    max_warmup=4,
    freeze_end=10,
    freeze_interval=2,
    score_interval=1,
    memory_budget=30_000,
    recompute="auto",
)


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: list[Any] = [
    *(None, True, -1, 0, 7, 2**53 + 1, 10**30, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf),
    *("", "x", "3", "\ud800", "int64", "nn", "bert.encoder.layer.0.attention.self.query"),
    *([], {}, [[]], {"": 0}, [1, 2, 3, 4], [None] * 4, {"step": 1}, {"input_ids": {"shape": [-1]}}),
    *(deep(50), deep(400), deep(100_000)),
]
Change = tuple[tuple[Any, ...], str, int, tuple[Any, ...]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON values."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from places(item, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def changes(good: dict[str, Any]) -> st.SearchStrategy[list[Change]]:
    """One to three places that are replaced, removed, repeated, turned round, nudged, or swapped for another part."""
    everywhere = list(places(good))
    # A part of the top is as likely as any other place, however few they are.
    place = st.one_of(st.sampled_from([path for path in everywhere if len(path) <= 2]), st.sampled_from(everywhere))
    hows = st.sampled_from(["replace", "replace", "remove", "repeat", "reverse", "nudge", "swap"])
    hostile = st.integers(0, len(HOSTILE) - 1)  # not itself, which hypothesis could not print
    return st.lists(st.tuples(place, hows, hostile, st.sampled_from(everywhere)), min_size=1, max_size=3)


def mutant(good: dict[str, Any], wanted: list[Change]) -> dict[str, Any]:
    tree = copy.deepcopy(good)
    for change in wanted:
        with suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            apply(tree, good, *change)
    return tree


def apply(tree: Any, good: Any, path: tuple[Any, ...], how: str, hostile: int, other: tuple[Any, ...]) -> None:
    parent = at(tree, path[:-1])
    if how == "remove":
        del parent[path[-1]]
    elif how == "repeat" and isinstance(parent, list):
        parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
    elif how == "reverse" and isinstance(parent, list):
        parent.reverse()
    elif how == "nudge" and isinstance(parent[path[-1]], int | float):
        parent[path[-1]] += 1
    elif how == "swap":
        parent[path[-1]] = copy.deepcopy(at(good, other))
    else:
        parent[path[-1]] = HOSTILE[hostile]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> RawLoop:
    """In the middle of an accumulation and of a scoring, with frozen adapters and a plan."""
    torch.set_num_threads(1)
    found = RawLoop(tmp_path_factory.mktemp("loop"), CONFIG).run(MICRO)
    state = found.freezer.state_dict()
    assert found.freezer.frozen and state["evidence"]["sums"] and state["planned"]["inputs"]
    return found


def text_of(state: Any) -> str | None:
    try:
        return json.dumps(state, sort_keys=True)
    except RecursionError:
        return None


def check_refused_or_usable(loop: RawLoop, good: dict[str, Any], load: Callable[[], None]) -> None:
    """Either a typed error and nothing changed, or the training goes on from what was loaded."""
    freezer = loop.freezer
    flags = [p.requires_grad for p in loop.model.parameters()]
    try:
        load()
    except StateError as error:
        assert 10 < len(str(error)) < 2000
        assert freezer.state_dict() == good
        assert [p.requires_grad for p in loop.model.parameters()] == flags
    else:
        freezer.metrics()
        json.dumps(freezer.state_dict(), allow_nan=False)
        freezer.report()
        loop.model(**loop.data[0]).loss.backward()
        freezer.step()
        loop.optimizer.zero_grad()
        freezer.load_state_dict(good)


def test_a_tampered_state_is_refused_whole(loop: RawLoop) -> None:
    good = loop.freezer.state_dict()

    @few
    @given(changes(good))
    def check(wanted: list[Change]) -> None:
        state = mutant(good, wanted)
        text = text_of(state)
        if text is None or text != text_of(good):
            with pytest.raises(StateError):
                loop.freezer.load_state_dict(state)
            assert loop.freezer.state_dict() == good

    check()


def test_a_tampered_state_with_a_right_checksum_is_refused_or_usable(loop: RawLoop) -> None:
    """The checksum is no secret: what it lets pass is looked at all the same."""
    good = loop.freezer.state_dict()

    @few
    @given(changes(good))
    def check(wanted: list[Change]) -> None:
        try:
            state = signed(mutant(good, wanted))
        except StateError:
            return
        check_refused_or_usable(loop, good, lambda: loop.freezer.load_state_dict(state))

    check()


def test_a_file_cut_short_or_with_flipped_bits_is_refused(loop: RawLoop, tmp_path: Path) -> None:
    good, path = loop.freezer.state_dict(), tmp_path / "safe.json"
    loop.freezer.save(path)
    whole = path.read_bytes()
    anywhere = st.integers(0, len(whole) - 1)

    @few
    @given(anywhere, st.lists(st.tuples(anywhere, st.integers(0, 7)), max_size=3), st.booleans())
    def check(cut: int, flips: list[tuple[int, int]], truncate: bool) -> None:
        data = bytearray(whole)
        for place, bit in flips:
            data[place] ^= 1 << bit
        path.write_bytes(data[:cut] if truncate else data)
        try:
            loop.freezer.load(path)
        except StateError as error:
            assert str(path) in str(error)
        assert loop.freezer.state_dict() == good  # a flipped bit in white space is no damage

    check()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["ledger"]["freezings"].append({**s["ledger"]["freezings"][0], "name": "nobody"}),
        lambda s: s["ledger"]["freezings"].append(s["ledger"]["freezings"][0]),
        lambda s: s["ledger"]["freezings"][0].update(step=99),
        lambda s: s["ledger"]["freezings"][0].update(step=-2),
        lambda s: s["ledger"]["freezings"][0].update(importance=0.125),
        lambda s: s["ledger"]["scorings"][0].update(step=99),
        lambda s: s["ledger"]["scorings"][0]["importance"].update(nobody=0.5),
        lambda s: s["ledger"].update(scorings=[]),
        lambda s: s["ledger"].update(warmup_end=None),
        lambda s: s["ledger"].update(warmup_end=99),
        lambda s: s.update(step=-1),
        lambda s: s.update(step=1),
        lambda s: s.update(step=10**300),
        lambda s: s.update(total_steps=0),
        lambda s: s["evidence"]["sums"].pop(),
        lambda s: s["evidence"]["sums"][0].pop(),
        lambda s: s["evidence"].update(importance={"nobody": 1.0}),
        lambda s: s["planned"].update(recompute=["nobody"]),
        lambda s: s["planned"]["inputs"]["tensors"]["input_ids"].update(dtype="nn"),
        lambda s: s["planned"]["inputs"]["tensors"]["input_ids"].update(shape=[-4, 12]),
        lambda s: s["planned"]["inputs"]["tensors"]["input_ids"].update(shape=[2**40, 2**40]),
        lambda s: s["planned"]["inputs"].update(constants={"a": {}}),
        lambda s: s["planned"]["inputs"].update(autocast="float7"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(loop: RawLoop, change: Callable[[dict[str, Any]], None]) -> None:
    good = loop.freezer.state_dict()
    state = copy.deepcopy(good)
    change(state)
    with pytest.raises(StateError, match=r"^(state|ledger)\b.*so use an older one"):
        loop.freezer.load_state_dict(signed(state))
    assert loop.freezer.state_dict() == good


def test_a_report_is_read_or_refused(loop: RawLoop, tmp_path: Path) -> None:
    good = json.loads(json.dumps(loop.freezer.report(memory=True).to_dict()))

    @few
    @given(changes(good))
    def check(wanted: list[Change]) -> None:
        try:
            read = FreezeReport.from_dict(mutant(good, wanted))
        except StateError:
            return
        read.rows()
        text = text_of(read.to_dict())
        assert text is None or FreezeReport.from_dict(json.loads(text)).rows() == read.rows()

    check()


def test_what_a_trainer_hands_back_is_read_or_refused(loop: RawLoop, tmp_path: Path) -> None:
    model = bert(lora_dropout=0.1)
    optimizer = adamw(model)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    good = {"SafeCallback": {"args": {}, "attributes": {"saved": loop.freezer.state_dict()}}}

    @settings(few, max_examples=40)
    @given(changes(good))
    def check(wanted: list[Change]) -> None:
        callback = SafeCallback(CONFIG)
        state = TrainerState(global_step=6, max_steps=12, stateful_callbacks=mutant(good, wanted))
        try:
            callback.on_train_begin(args, state, TrainerControl(), model=model, optimizer=optimizer)
        except SafeError:
            pass
        else:
            callback.freezer.detach()
        AdapterFreezer(model, optimizer, CONFIG).detach()  # whatever came of it, the model is free again

    check()


def test_a_callback_of_ones_own_kind_goes_on_too(loop: RawLoop, tmp_path: Path) -> None:
    class Mine(SafeCallback):
        pass

    callback, model = Mine(CONFIG), bert(lora_dropout=0.1)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    saved = {"Mine": [{"attributes": {"saved": loop.freezer.state_dict()}}]}
    state = TrainerState(global_step=6, max_steps=12, stateful_callbacks=saved)
    callback.on_train_begin(args, state, TrainerControl(), model=model, optimizer=adamw(model))
    assert callback.freezer.frozen == loop.freezer.frozen


def test_options_are_read_or_refused() -> None:
    good = SafeConfig(memory_budget="1GiB", never_freeze=("a",)).to_dict()

    @few
    @given(changes(good))
    def check(wanted: list[Change]) -> None:
        options = mutant(good, wanted)
        assume(text_of(options) is not None)  # no file can hold it
        try:
            SafeConfig.from_dict(options)
        except ConfigError as error:
            assert 10 < len(str(error)) < 2000

    check()
    for options in (None, 3, "score", ["score"]):
        with pytest.raises(ConfigError, match="expected options by name"):
            SafeConfig.from_dict(options)  # type: ignore[arg-type]
