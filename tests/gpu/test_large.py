"""The same as in test_values.py at sizes with ragged tiles, and at sizes that fill a GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import Case, large_cases
from gpu_checks import problems

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", list(large_cases()), ids=str)
def test_a_large_call_is_right(case: Case, device: torch.device) -> None:
    assert not (wrong := problems(case, device)), "; ".join(wrong)
