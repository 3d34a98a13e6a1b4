"""The options of bottleneck adapters, and their name among PEFT's methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

NAME = "BOTTLENECK"
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
KINDS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
KINDS |= {"silu": "silu", "swish": "silu"}
"""By the names of `non_linearity`, the activations of `safe_kernels.bottleneck`."""


def _peft_type() -> Any:
    """Return PEFT's type of this method. PEFT requires an entry in an enum, which has no function to add one."""
    if NAME not in PeftType.__members__:
        entry = str.__new__(PeftType, NAME)
        entry._name_, entry._value_ = NAME, NAME
        type.__setattr__(PeftType, NAME, entry)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = entry
    return PeftType(NAME)


PEFT_TYPE = _peft_type()


@dataclass
class BottleneckConfig(PeftConfig):
    """The configuration of bottleneck adapters, for `peft.get_peft_model`.

    Args:
        target_modules: the linear layers that get an adapter on their output, as in PEFT's other methods. None: they
            are found by structure, for each transformer block.
        exclude_modules: modules to leave out, as in PEFT's other methods.
        reduction_factor: the layer's features divided by the adapter's hidden units.
        non_linearity: "relu", "gelu", "gelu_tanh" (or "gelu_new"), "silu" (or "swish").
        placement: "houlsby": after attention and after the MLP, before the residual connection (arXiv 1902.00751).
            "pfeiffer": after the MLP only (arXiv 2005.00247). "parallel": from the MLP's input to its output
            (arXiv 2110.04366).
        scaling: the factor of the adapter's output.
        dropout: probability that a hidden unit is dropped.
        modules_to_save: further modules that are trained and saved, as in PEFT's other methods.
        init_weights: begin with an adapter that changes nothing (W_up and the biases are zero); False for tests.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), BottleneckConfig(target_modules=["0"]))
        >>> model.base_model.model[0].bottleneck_down["default"]
        Linear(in_features=32, out_features=2, bias=True)
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    reduction_factor: float = 16
    non_linearity: str = "relu"
    placement: str = "houlsby"
    scaling: float = 1.0
    dropout: float = 0.0
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.non_linearity not in KINDS:
            raise ValueError(f"non_linearity: expected one of {', '.join(KINDS)}, got {self.non_linearity!r}.")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}, got {self.placement!r}.")
        if not self.reduction_factor > 0:
            raise ValueError(f"reduction_factor: expected a number above 0, got {self.reduction_factor!r}.")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {self.dropout!r}.")
