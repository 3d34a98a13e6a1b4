"""Every op's values and gradients on a GPU: see gpu_checks.py."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import Case, small_cases
from gpu_checks import problems

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", list(small_cases()), ids=str)
def test_a_call_is_right(case: Case, device: torch.device) -> None:
    assert not (wrong := problems(case, device)), "; ".join(wrong)
