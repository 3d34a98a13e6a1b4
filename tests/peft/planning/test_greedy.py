"""The choice of what to freeze and what to recompute, on tables made up by hand and at random."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_peft import ConfigError
from safe_peft.freezing.config import parse_size
from safe_peft.planning import greedy
from safe_peft.planning.greedy import bytes_limit, fit
from safe_peft.planning.retained import BlockFacts, RetainedTable, Saver, Storage


def stack(blocks: int = 3, adapters: int = 3, x: int = 100, inner: int = 300, hidden: int = 50) -> RetainedTable:
    """Blocks whose first two adapters read one tensor and whose last reads another; gradients pass from below."""
    count = blocks * adapters
    storages, facts, names = [], [], []
    for block in range(blocks):
        bits = [1 << block * adapters + i for i in range(adapters)]
        below = (1 << block * adapters) - 1
        through = below | sum(bits)
        names += [f"layers.{block}.{part}" for part in ("q", "v", "up")[:adapters]]
        readers = [Saver("q", "LoRA inputs", block, bit, block * adapters + i) for i, bit in enumerate(bits[:2])]
        storages += [
            Storage(x, tuple(readers)),
            Storage(inner, (Saver("mlp", "MLP", block, through),)),
            Storage(x, (Saver("up", "LoRA inputs", block, bits[-1], block * adapters + adapters - 1),)),
            Storage(hidden, ()),
        ]
        facts.append(BlockFacts(f"layers.{block}", sum(bits), below, (len(storages) - 1,), 7))
    storages.append(Storage(40, (Saver("head", "head and loss", -1, (1 << count) - 1),)))
    return RetainedTable(tuple(names), tuple(facts), tuple(storages))


TABLE = stack()
NAMES = TABLE.adapters
EVEN = dict.fromkeys(NAMES, 1.0)
BLOCKS = {"off": (), "frozen": tuple(block.name for block in TABLE.blocks)}


def price(costs: dict[str, float], names: Iterable[str]) -> float:
    return math.fsum(costs[name] for name in names)


def test_what_the_table_says() -> None:
    assert TABLE.bytes() == 3 * 500 + 40
    assert TABLE.bytes(NAMES[:1]) == TABLE.bytes(), "v reads the same tensor"
    assert TABLE.bytes(NAMES[:2]) == TABLE.bytes() - 100
    assert TABLE.bytes(NAMES[:3]) == TABLE.bytes() - 500, "nothing below the second block needs a graph"
    assert TABLE.bytes(NAMES[3:6]) == TABLE.bytes() - 200, "gradients still pass"
    assert TABLE.bytes(NAMES[3:6], ["layers.1"]) == TABLE.bytes() - 500 + 50 + 7
    assert TABLE.bytes(NAMES[:6], ["layers.1"]) == 540
    assert TABLE.bytes(NAMES) == 0
    assert TABLE.recomputed(NAMES[3:6], ["layers.0", "layers.1"]) == ["layers.1"]
    assert TABLE.groups() == [tuple(NAMES[i : i + n]) for b in (0, 3, 6) for i, n in ((b, 2), (b + 2, 1))]
    assert sum(TABLE.by_part().values()) == sum(TABLE.by_block().values()) == TABLE.bytes()


def test_a_model_without_blocks_and_a_step_that_retains_nothing() -> None:
    bare = RetainedTable(("a",), (), (Storage(8, (Saver("a", "LoRA inputs", -1, 1, 0),)),))
    assert (bare.bytes(), bare.bytes(["a"], ["x"]), bare.recomputed(["a"], ["x"])) == (8, 0, [])
    assert fit(bare, {"a": 0.5}, 4, recompute="auto").freeze == ("a",)
    empty = RetainedTable((), (), ())
    assert empty.bytes() == 0 and empty.groups() == [] and fit(empty, {}, 1).fits


def test_nothing_is_done_where_nothing_has_to_be() -> None:
    choice = fit(TABLE, EVEN, 10_000, recompute="auto")
    assert (choice.freeze, choice.recompute, choice.bytes, choice.fits) == ((), (), TABLE.bytes(), True)


def test_the_cheapest_byte_goes_first() -> None:
    costs = EVEN | {"layers.2.up": 0.01, "layers.1.up": 0.02}
    assert fit(TABLE, costs, TABLE.bytes() - 100).freeze == ("layers.2.up",)
    assert set(fit(TABLE, costs, TABLE.bytes() - 200).freeze) == {"layers.2.up", "layers.1.up"}


def test_a_prefix_is_seen_although_none_of_its_adapters_frees_much_alone() -> None:
    choice = fit(TABLE, EVEN, TABLE.bytes() - 1000)
    assert sorted(choice.freeze) == sorted(NAMES[:6]) and choice.bytes == TABLE.bytes() - 1000


def test_one_that_is_enough_is_taken_rather_than_one_that_is_a_bargain() -> None:
    costs = EVEN | dict.fromkeys(NAMES[:3], 0.3) | {"layers.2.up": 0.2}
    assert fit(TABLE, costs, TABLE.bytes() - 90).freeze == ("layers.2.up",)


def test_recomputing_comes_before_freezing_more_and_no_more_than_is_needed() -> None:
    frozen = NAMES[3:]
    plain = TABLE.bytes(frozen)
    saving = 300 - 50 - 7
    choices = [fit(TABLE, EVEN, plain - n * saving, frozen=frozen, recompute="auto") for n in (0, 1, 2)]
    assert [choice.freeze for choice in choices] == [(), (), ()]
    assert [len(choice.recompute) for choice in choices] == [0, 1, 2]
    assert all(choice.fits for choice in choices)
    every = fit(TABLE, EVEN, plain, frozen=frozen, recompute="frozen")
    assert every.recompute == ("layers.1", "layers.2") and every.bytes == plain - 2 * saving


def test_a_block_may_be_frozen_for_what_recomputing_it_saves() -> None:
    costs = EVEN | dict.fromkeys(NAMES[3:6], 0.01)
    choice = fit(TABLE, costs, TABLE.bytes() - 400, recompute="auto")
    assert (sorted(choice.freeze), choice.recompute) == (sorted(NAMES[3:6]), ("layers.1",))


def test_who_is_spared_or_has_no_importance_stays_live() -> None:
    costs = {name: 1.0 for name in NAMES if name != "layers.0.q"} | {"layers.0.up": math.nan}
    choice = fit(TABLE, costs, 1)
    assert not choice.fits and set(choice.freeze) == set(NAMES[3:]), (
        "v of the first block would free nothing: q is live"
    )


def test_one_stays_live_where_nothing_else_trains() -> None:
    assert set(fit(TABLE, EVEN, 1).freeze) == set(NAMES)
    choice = fit(TABLE, EVEN, 1, keep_one=True)
    assert len(choice.freeze) < len(NAMES) and not choice.fits


def test_a_cut_is_taken_where_the_greedy_way_is_dearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs at random: never dearer than the search without cuts, mostly equal to the best of all sets."""
    every = list(chain.from_iterable(combinations(NAMES, n) for n in range(len(NAMES) + 1)))
    sizes = {recompute: [TABLE.bytes(names, blocks) for names in every] for recompute, blocks in BLOCKS.items()}
    cheaper = best = 0
    for seed in range(60):
        draw = random.Random(seed)
        costs = {name: draw.lognormvariate(0, 1) for name in NAMES}
        limit, recompute = int(TABLE.bytes() * draw.choice((0.2, 0.4, 0.6, 0.8))), draw.choice(list(BLOCKS))
        found = price(costs, fit(TABLE, costs, limit, recompute=recompute).freeze)
        with monkeypatch.context() as without:
            without.setattr(greedy._Search, "cuts", lambda self: iter(()))
            plain = price(costs, fit(TABLE, costs, limit, recompute=recompute).freeze)
        least = min(price(costs, names) for names, size in zip(every, sizes[recompute], strict=True) if size <= limit)
        assert least <= found + 1e-9 and found <= plain + 1e-9
        cheaper, best = cheaper + (found < plain - 1e-9), best + (found < least + 1e-9)
    assert cheaper and best > 50


@st.composite
def tables(draw: st.DrawFn) -> tuple[RetainedTable, dict[str, float]]:
    count = draw(st.integers(1, 5))
    masks = st.integers(0, (1 << count + 1) - 1)
    savers = st.builds(Saver, st.just("m"), st.just("MLP"), st.integers(-1, 1), masks, st.integers(-1, count - 1))
    storages = draw(
        st.lists(
            st.builds(Storage, st.integers(0, 100), st.lists(savers, max_size=3).map(tuple)), min_size=1, max_size=8
        )
    )
    inputs = st.lists(st.integers(0, len(storages) - 1), max_size=2).map(tuple)
    blocks = tuple(
        BlockFacts(name, draw(masks), draw(masks), draw(inputs), draw(st.integers(0, 9))) for name in ("a", "b")
    )
    names = tuple(f"n{index}" for index in range(count))
    return RetainedTable(names, blocks, tuple(storages)), {name: draw(st.floats(0, 1)) for name in names}


def by_hand(table: RetainedTable, frozen: tuple[str, ...], recompute: tuple[str, ...]) -> int:
    """The table's meaning, spelt out."""
    live = {i for i, name in enumerate(table.adapters) if name not in frozen} | {len(table.adapters)}

    def lives(mask: int) -> bool:
        return any(mask >> bit & 1 for bit in live)

    again = {i for i, b in enumerate(table.blocks) if b.name in recompute and not lives(b.holds) and lives(b.passes)}
    kept = set(chain.from_iterable(table.blocks[i].inputs for i in again))
    for index, storage in enumerate(table.storages):
        if any(lives(saver.needs) and saver.block not in again for saver in storage.savers):
            kept.add(index)
    return sum(table.storages[i].bytes for i in kept) + sum(table.blocks[i].random_state for i in again)


@given(tables())
@settings(max_examples=40, deadline=None)
def test_bytes_are_what_their_definition_says(case: tuple[RetainedTable, dict[str, float]]) -> None:
    table, _ = case
    sets = list(chain.from_iterable(combinations(table.adapters, n) for n in range(len(table.adapters) + 1)))
    for recompute in ((), ("a",), ("a", "b")):
        assert [table.bytes(frozen, recompute) for frozen in sets] == [by_hand(table, f, recompute) for f in sets]


@given(tables(), st.integers(1, 500), st.sampled_from(["off", "frozen", "auto"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_choice_is_what_it_says(
    case: tuple[RetainedTable, dict[str, float]], limit: int, recompute: str, keep_one: bool
) -> None:
    table, importance = case
    choice = fit(table, importance, limit, recompute=recompute, keep_one=keep_one)
    assert choice.bytes == table.bytes(choice.freeze, choice.recompute)
    assert choice.fits == (choice.bytes <= limit)
    assert len(set(choice.freeze)) == len(choice.freeze) and set(choice.freeze) <= set(table.adapters)
    assert choice.recompute == () or recompute != "off"
    if keep_one:
        assert len(choice.freeze) < len(table.adapters)
    assert choice == fit(table, importance, limit, recompute=recompute, keep_one=keep_one)
    plain = fit(table, importance, limit, keep_one=keep_one)
    if recompute == "auto" and plain.fits:
        costs = [sum(importance[name] for name in one.freeze) for one in (choice, plain)]
        assert choice.fits and costs[0] <= costs[1] + 1e-9


def test_the_limit_comes_down_along_the_curve() -> None:
    assert [bytes_limit(1000, 400, share) for share in (0.0, 0.5, 1.0)] == [1000, 700, 400]
    assert bytes_limit(300, 400, 0.0) == 400


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("6GiB", 6 * 2**30),
        ("800MB", 800 * 10**6),
        (" 1.5 kib ", 1536),
        ("2TB", 2 * 10**12),
        ("12", 12),
        ("9B", 9),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "6 gigabytes", "6GiB/s", 0, -5, 1.5, True, None, "0MB", "nan"])
def test_what_is_no_size_is_named(text: object) -> None:
    with pytest.raises(ConfigError, match=r'memory_budget: expected a size such as "6GiB", .* above 0, got '):
        parse_size(text)
