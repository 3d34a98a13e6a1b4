"""Every registered op, called directly with arguments that are wrong or odd: the reference's answer, or an error."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import OPS, PYTHON_ERRORS, arguments_of, check, mutated

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
every_op = pytest.mark.parametrize("op", list(OPS))


@every_op
@given(seed=st.integers(0, 2**32))
def test_wrong_and_odd_arguments_give_the_references_answer_or_an_error(op: str, seed: int) -> None:
    check(op, *mutated(op, Random(seed)))


@every_op
def test_without_a_mutation_every_op_answers(op: str) -> None:
    assert check(op, arguments_of(op, Random(0)), [])


@every_op
def test_every_tensor_that_a_call_needs_is_named_when_it_is_missing(op: str) -> None:
    arguments = arguments_of(op, Random(0))
    for argument in getattr(torch.ops.safe_kernels, op).default._schema.arguments:
        if str(argument.type) == "Tensor":
            with pytest.raises(PYTHON_ERRORS, match=rf"{argument.name}\b"):
                getattr(torch.ops.safe_kernels, op)(**{**arguments, argument.name: None})
