from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

torch_version: str  # that it was compiled against
compiler: str  # its version

def announce_reader(x: Tensor) -> None: ...  # csrc/autograd/norm_output.h
def leave_hooks(out: Tensor, hook: object) -> None: ...  # the same file
def invertible(  # csrc/inversion.cpp
    weight: Tensor | None, bias: Tensor | None, offset: float, limit: float, smallest: float
) -> bool | None: ...
def marks(tensor: Tensor) -> tuple[int, ...] | None: ...
def fingerprint(tensor: Tensor) -> int | None: ...  # csrc/readable.h

_Launch = tuple[int, tuple[int, int, int], int, int, list[tuple[int, int]]]
_View = tuple[int, list[int], list[int], int]
_Product = tuple[_View, _View, _View]

class LaunchRecord:  # csrc/launch_replay/launch_record.h
    def __init__(
        self,
        allocations: list[tuple[list[int], torch.dtype, int, int]],
        steps: list[_Launch | _Product],
        results: list[int],
    ) -> None: ...

def register_replayed(
    op: str, host: Callable[..., Any], recorded: Callable[..., tuple[Any, LaunchRecord | None, bool]], key: str
) -> None: ...
def forget_records() -> None: ...
def record_counts() -> dict[str, int]: ...
