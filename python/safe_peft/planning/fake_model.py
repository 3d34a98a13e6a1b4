"""Copies a model without its values: tensors that have a shape, a dtype and a storage, but no memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import FakeCopyMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

from ..binding.blocks import parts_of
from ..binding.blocks.norms import INVERTS, Norm
from ..distributed.fsdp import is_spread
from ..distributed.wrappers import buffers_of, parameters_of, walk
from ..errors import PlanError, first_line
from .sharded import check_sharding, copy_units, whole_dtypes

_ALL, _ANY = torch.ops.aten.all.default, torch.ops.aten.any.default
_FIND_PACKED = "find_packed_sequence_indices"
_PLAIN = frozenset({Tensor, nn.Parameter, FakeTensor})
_ATTACHED = "_attached"
"""On a copied parameter: names of the attributes that came along."""


class FakeModel:
    """A copy of a model on fake tensors. The model itself is neither changed nor read, and may be on the meta device.

    Hooks and replaced forwards come along, as `copy.deepcopy` copies them; bindings and a freezer's hooks do not. So do
    the scales of quantised weights, wherever a layer keeps them: `tensors` are all that the copy holds.

    Args:
        model: any module.
        kind: of the device that the plan is for; what lies on one of another kind is copied to the CPU.

    Raises:
        PlanError: It cannot be copied.

    Example:
        >>> fake = FakeModel(nn.Linear(2, 3, device="meta"))
        >>> with fake.mode:
        ...     fake.module(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, kind: str = "") -> None:
        check_sharding(model)
        self.mode, self._kind = FakeTensorMode(), kind
        memo: dict[int, Any] = {}
        self._shapes: dict[int, Tensor] = {}
        self._whole = whole_dtypes(model)
        self.tensors: list[Tensor] = []
        parameters = parameters_of(model)
        tensors = [*parameters, *buffers_of(model), *(p.grad for p in parameters if p.grad is not None)]
        try:
            with self.mode:
                for tensor in tensors:
                    memo[id(tensor)] = self._fake(tensor)
                for parameter in parameters:
                    memo[id(parameter)].grad = None
            with _Copying(self), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                copy_units(model, memo)
                self.module: nn.Module = copy.deepcopy(model, memo)
                for parameter in parameters:
                    _attach(parameter, memo)
        except Exception as error:
            raise PlanError(
                f"{type(model).__name__} cannot be copied for a plan ({first_line(error)}); take off what was put on "
                "its modules, or plan before that."
            ) from error
        self.tensors += [*parameters_of(self.module), *buffers_of(self.module)]
        self._note_norms(model)

    def _note_norms(self, model: nn.Module) -> None:
        """Whether a norm can do without its input depends on its weights' values, which the copy does not have."""
        parameters = parameters_of(model)
        if any(isinstance(p.data, FakeTensor) or p.is_meta or is_spread(p) for p in parameters):
            return  # nothing to look at, at least not without other processes, or noted before
        norms = {id(module): part for _, module, part in parts_of(model) if isinstance(part, Norm)}
        for (_, original), (_, module) in zip(walk(model), walk(self.module), strict=True):
            if id(original) in norms:
                module.__dict__[INVERTS] = norms[id(original)].retains_output(original)

    def _fake(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._whole:
            empty = torch.empty(tensor.shape, dtype=self._whole[id(tensor)], device=self._device(tensor))
            return nn.Parameter(empty, requires_grad=tensor.requires_grad)
        if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided:
            return self.mode.from_tensor(tensor, static_shapes=True)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._shapes:  # tensors that share memory go on sharing it
            count = storage.nbytes() // tensor.element_size()
            self._shapes[storage._cdata] = torch.empty(count, dtype=tensor.dtype, device=self._device(tensor))
        base = self._shapes[storage._cdata]
        base = base if base.dtype == tensor.dtype else base.view(tensor.dtype)
        fake = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    def _device(self, tensor: Tensor) -> torch.device:
        there = tensor.device.type != "meta" and tensor.device.type == (self._kind or tensor.device.type)
        return tensor.device if there else torch.device("cpu")


class _Copying(FakeCopyMode):
    """Copies tensors that modules hold in addition to their parameters and buffers, as quantised layers do."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__(model.mode)
        self.model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or id(args[0]) in args[1]:
            return super().__torch_function__(func, types, args, kwargs)
        tensor, memo = args
        with self.model.mode:
            memo[id(tensor)] = self.model._fake(tensor)
        self.model.tensors.append(memo[id(tensor)])
        return memo[id(tensor)]


def _attach(parameter: nn.Parameter, memo: dict[int, Any]) -> None:
    """Give a copy what bitsandbytes hangs on its parameters: a fake tensor can be of no other class."""
    own = vars(parameter)
    known = type(parameter) in _PLAIN or is_traceable_wrapper_subclass(parameter)
    names = own.get(_ATTACHED, () if known else tuple(own))
    if names:
        copied = {name: copy.deepcopy(own[name], memo) for name in names}
        memo[id(parameter)].__dict__.update(copied, **{_ATTACHED: names})


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


class MaskAnswers(TorchDispatchMode):
    """Answers transformers 4, which asks whether a mask [rows, tokens] is all ones, and whether any token is padding.

    Transformers 5 does not ask fake tensors. Every other question about values remains an error.

    Args:
        rows: of the batches that a step is called with.
        padded: the answer.
    """

    def __init__(self, rows: Collection[int], padded: bool) -> None:
        super().__init__()
        self.rows, self.padded = rows, padded
        self._asked: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0] in self._asked:
            return self._asked[args[0]]
        out = func(*args, **(kwargs or {}))
        if func in (_ALL, _ANY) and args[0].dim() == 2 and args[0].shape[0] in self.rows:
            self._asked[out] = self.padded == (func is _ANY)
        return out
