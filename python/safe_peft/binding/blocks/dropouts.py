"""Dropout that retains 16 bytes of random state instead of a mask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import safe_kernels

from ..class_swap import STATE, SwappedModule, is_bound, own_forward
from .base import Part, is_dropout, is_plain


class SafeDropout(SwappedModule):
    """nn.Dropout computed by `safe_kernels.dropout`."""

    p: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """Set elements to zero at random in training."""
        if not is_bound(self):
            return own_forward(self, input)
        if not self.training or self.p == 0.0 or not is_plain(input) or self.__dict__[STATE].refusal(self):
            return super().forward(input)
        return safe_kernels.dropout(input, self.p)


@dataclass
class Dropout(Part):
    """A dropout module, anywhere in the model."""

    mixin = SafeDropout
    stem = "dropouts"
    op: str = "safe_kernels::dropout"

    @classmethod
    def recognise(cls, module: nn.Module) -> Dropout | None:
        """Recognise nn.Dropout itself."""
        return cls() if is_dropout(module) else None

    def refusal(self, module: nn.Module) -> str | None:
        """Return why the module's own code must compute its calls: dropout in place is not supported."""
        return "inplace=True" if getattr(module, "inplace", False) else super().refusal(module)
