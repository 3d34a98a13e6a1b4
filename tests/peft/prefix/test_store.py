"""Tensors kept in memory, in a file, and among processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import together

from safe_peft.prefix.store import Store


def test_entries_go_when_nobody_has_read_them_for_two_epochs() -> None:
    store = Store(memory=256)
    for key in "abcd":
        assert store.get(key) is None and store.put(key, 1, torch.ones(16))
    assert store.get("e") is None and not store.put("e", 1, torch.ones(16)) and store.is_full
    for _ in range(11):
        store.get("a")
    assert store.put("e", 1, torch.zeros(16))
    assert store.get("b") is None and store.get("a") is not None and store.get("e") is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_come_back_as_they_were(dtype: torch.dtype) -> None:
    store = Store(memory=1 << 16, file=1 << 16)
    values = {str(n): torch.randn(n, 3).to(dtype) for n in range(1, 40)}
    for key, value in values.items():
        assert store.put(key, 2, value)
    for key, value in values.items():
        found = store.get(key)
        assert found is not None and found.depth == 2 and torch.equal(found.value, value)


def test_damaged_bytes_are_not_used() -> None:
    store = Store(memory=1 << 12)
    store.put("a", 1, torch.ones(4))
    store._areas[0].bytes(0, 4).fill_(7)
    assert store.get("a") is None


def keep_and_read(rank: int) -> tuple[int, int]:
    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None, None]
        torch.distributed.all_gather_object(found, value)
        return found

    store = Store(memory=1 << 14)
    store.share(gather)
    for number in range(10):
        store.put(f"{rank}.{number}", rank + 1, torch.full((3, 4), float(number)))
    gather(None)
    store.refresh()
    found = [store.get(f"{1 - rank}.{number}") for number in range(10)]
    right = sum(bool(one and one.depth == 2 - rank and (one.value == n).all()) for n, one in enumerate(found))
    gather(None)
    store.drop(above=1)
    return right, sum(store.get(f"{1 - rank}.{number}") is not None for number in range(10))


def test_processes_read_what_others_have_kept() -> None:
    (first, left), (second, right) = together(keep_and_read)
    assert (first, second) == (10, 10)
    assert (left, right) == (0, 10), "process 0 dropped what process 1 kept at depth 2"
