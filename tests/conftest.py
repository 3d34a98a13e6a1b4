"""For all tests: one thread, a seed, no hub, and how hard property tests try (`--hypothesis-profile=thorough`)."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import forks
import pytest
import torch

with suppress(ModuleNotFoundError):  # tests/gpu has no property tests, and needs pytest alone
    from hypothesis import settings

    settings.register_profile("quick", max_examples=50, deadline=None)
    settings.register_profile("thorough", max_examples=5000, deadline=None)
    settings.load_profile("quick")


def pytest_configure() -> None:
    gc.disable()  # until all is imported: imports make no garbage to speak of


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several processes, files of few tests begin: they take long, and none is to be left for one at the end."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: tests[item.path])


def pytest_collection_finish() -> None:
    """What the imports made stays for good: no collection of garbage is to walk through it again."""
    gc.freeze()
    gc.enable()
    forks.start_server()  # everything is imported, and no test has run


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_of_other_files() -> None:
    """Nor through what earlier files have left, for every `Trainer` collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
