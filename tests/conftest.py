"""For all tests: how hard property tests try (`--hypothesis-profile=thorough`: thousands of cases), and speed."""

from __future__ import annotations

import gc
from contextlib import suppress

with suppress(ModuleNotFoundError):  # tests/gpu has no property tests, and asks for no more than pytest
    from hypothesis import settings

    settings.register_profile("quick", max_examples=50, deadline=None)
    settings.register_profile("thorough", max_examples=5000, deadline=None)
    settings.load_profile("quick")


def pytest_collection_finish() -> None:
    """The tests themselves are a million objects, which no collection in a test needs to visit."""
    gc.collect()
    gc.freeze()
