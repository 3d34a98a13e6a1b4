"""Copies a model without its values: tensors that have a shape, a dtype and a storage, but no memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import FakeCopyMode
from transformers import masking_utils

from ..blocks import parts_of
from ..blocks.norms import INVERTS, Norm
from ..errors import PlanError

_FIND_PACKED = "find_packed_sequence_indices"
_PLAIN = frozenset({Tensor, nn.Parameter, FakeTensor})


class FakeModel:
    """A copy of a model on fake tensors. The model itself is neither changed nor read, and may be on the meta device.

    Hooks and replaced forwards come along, as `copy.deepcopy` copies them; bindings and a freezer's hooks do not.

    Args:
        model: any module.

    Raises:
        PlanError: It cannot be copied.

    Example:
        >>> fake = FakeModel(nn.Linear(2, 3, device="meta"))
        >>> with fake.mode:
        ...     fake.module(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module) -> None:
        self.mode = FakeTensorMode()
        memo: dict[int, Any] = {}
        shapes: dict[int, Tensor] = {}
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        try:
            with self.mode:
                for tensor in tensors:
                    memo[id(tensor)] = self._fake(tensor, shapes)
                for parameter in model.parameters():
                    memo[id(parameter)].grad = None
            with FakeCopyMode(self.mode), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.module: nn.Module = copy.deepcopy(model, memo)
        except Exception as error:
            raise PlanError(
                f"{type(model).__name__} cannot be copied for a plan ({first_line(error)}); take off what was put on "
                "its modules, or plan before that."
            ) from error
        self._note_norms(model)

    def _note_norms(self, model: nn.Module) -> None:
        """Whether a norm can do without its input depends on its weights' values, which the copy does not have."""
        if any(isinstance(parameter.data, FakeTensor) or parameter.is_meta for parameter in model.parameters()):
            return  # nothing to look at, or noted before
        norms = {id(module): part for _, module, part in parts_of(model) if isinstance(part, Norm)}
        for original, module in zip(model.modules(), self.module.modules(), strict=True):
            if id(original) in norms:
                module.__dict__[INVERTS] = norms[id(original)].retains_output(original)

    def _fake(self, tensor: Tensor, shapes: dict[int, Tensor]) -> Tensor:
        if type(tensor) not in _PLAIN:
            return self.mode.from_tensor(tensor, static_shapes=True)
        device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
        storage = tensor.untyped_storage()
        if storage._cdata not in shapes:  # tensors that share memory go on sharing it
            count = storage.nbytes() // tensor.element_size()
            shapes[storage._cdata] = torch.empty(count, dtype=tensor.dtype, device=device)
        base = shapes[storage._cdata]
        base = base if base.dtype == tensor.dtype else base.view(tensor.dtype)
        fake = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake


@contextmanager
def ordinary_positions() -> Iterator[None]:
    """Let transformers take a fake batch for an unpacked one, as nearly every batch is.

    It looks for sequences packed into one row in the values of `position_ids`, and builds a mask to be safe where there
    are no values. For real tensors nothing changes, in whatever thread.
    """
    original = getattr(masking_utils, _FIND_PACKED, None)
    if original is None:
        yield
        return

    def find(position_ids: Tensor) -> Tensor | None:
        found: Tensor | None = None if isinstance(position_ids, FakeTensor) else original(position_ids)
        return found

    setattr(masking_utils, _FIND_PACKED, find)
    try:
        yield
    finally:
        setattr(masking_utils, _FIND_PACKED, original)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
