"""MLPs, single activations and dropouts, computed by ops that retain less.

An MLP is bound as a whole if it has a gate, or a dropout between the activation and the last layer. In other MLPs the
activation retains the pre-activation, and the next layer recomputes its input from it. A dropout retains 16 bytes of
random state instead of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

import safe_kernels
from safe_kernels import reference

from ..class_swap import autocasts, original_type
from .base import Part, agrees, is_dropout, is_linear, sample, small_linear, stand_in

KINDS = ("silu", "gelu", "gelu_tanh", "relu")


def activation_kind(module: nn.Module | None) -> str | None:
    """Return which kind of `safe_kernels.activation` a module computes, by a trial call; None if it is none of them."""
    if module is None or any((module._parameters, module._buffers, module._modules)):
        return None
    if isinstance(module, nn.Dropout | nn.Identity) or getattr(module, "inplace", False):
        return None
    far = [-300.0, -30.0, -9.0, 9.0, 12.0, 30.0, 300.0]
    x = torch.cat([torch.linspace(-6.0, 6.0, 97), torch.tensor(far)]).float()
    run = partial(original_type(module).forward, stand_in(module), x)
    return next((kind for kind in KINDS if agrees(run, reference.activation(x, kind))), None)


@dataclass
class Activation(Part):
    """An activation module that computes one kind of `safe_kernels.activation`."""

    stem = "mlps"
    kind: str
    op: str = "safe_kernels::activation"

    @classmethod
    def recognise(cls, module: nn.Module) -> Activation | None:
        kind = activation_kind(module)
        return None if kind is None else cls(kind)

    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> Tensor | None:
        return safe_kernels.activation(args[0], self.kind) if self.takes(module, *args, **kwargs) else None


@dataclass
class Dropout(Part):
    """A dropout module, anywhere in the model."""

    stem = "dropouts"
    op: str = "safe_kernels::dropout"

    @classmethod
    def recognise(cls, module: nn.Module) -> Dropout | None:
        return cls() if is_dropout(module) else None

    def refusal(self, module: nn.Module) -> str | None:
        """Return why the module's own code must compute its calls: dropout in place is not supported."""
        return "inplace=True" if getattr(module, "inplace", False) else super().refusal(module)

    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> Tensor | None:
        drops = module.training and module.p != 0.0 and self.takes(module, *args, **kwargs)
        return safe_kernels.dropout(args[0], module.p) if drops else None


@dataclass
class Mlp(Part):
    """The roles of an MLP's children.

    Args:
        gate: the layer before the activation.
        up: the layer whose output is multiplied by the activation; None if there is none.
        down: the last layer.
        activation: the activation.
        kind: the activation's name in `safe_kernels.activation`.
        fused: whether the layer `gate` computes gate and up together: the gate is its "first" or "last" half; None if
            it computes only the gate.
        dropout: the dropout module, if any.
        drops: the dropout's place: before the last layer ("inner") or after it ("outer").
    """

    stem = "mlps"
    gate: str
    up: str | None
    down: str
    activation: str
    kind: str
    fused: str | None = None
    dropout: str | None = None
    drops: str | None = None

    @property
    def op(self) -> str:  # type: ignore[override]
        return f"safe_kernels::{'gated_activation' if self.is_gated else 'activation'}"

    @property
    def covers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The activation, and the dropout before the last layer."""
        inner = (self.dropout,) if self.drops == "inner" and self.dropout is not None else ()
        return (self.activation, *inner)

    @property
    def is_gated(self) -> bool:
        """Whether two layers' outputs are multiplied."""
        return self.up is not None or self.fused is not None

    @classmethod
    def recognise(cls, module: nn.Module) -> Mlp | None:
        """Recognise two or three linear layers, an activation and at most one dropout, that compute such an MLP."""
        children = module._modules
        linear = [name for name, child in children.items() if is_linear(child)]
        dropouts = [name for name, child in children.items() if is_dropout(child)]
        others = [name for name in children if name not in linear and name not in dropouts]
        if len(linear) not in (2, 3) or len(dropouts) > 1 or len(others) != 1 or module._parameters or module._buffers:
            return None
        kind = activation_kind(children[others[0]])
        if kind is None:
            return None
        known = {"activation": others[0], "kind": kind}
        return next((mlp for mlp in _candidates(linear, dropouts, known) if mlp._computes(module)), None)

    def _computes(self, module: nn.Module) -> bool:
        """Whether a stand-in with small layers computes the formula of these roles."""
        sizes = {self.gate: (4, 12 if self.fused else 6), self.down: (6, 4)}
        if self.up is not None:
            sizes[self.up] = (4, 6)
        layers = {name: small_linear(*size, seed) for seed, (name, size) in enumerate(sizes.items())}
        children: dict[str, nn.Module] = {**layers, self.activation: stand_in(module._modules[self.activation])}  # type: ignore[arg-type]
        if self.dropout is not None:
            children[self.dropout] = _Marker()
        x, clone = sample(5, 4), stand_in(module, children=children)
        with torch.no_grad():
            hidden = self._first(clone, x)
            y = reference.activation(hidden[0], self.kind)
            y = y * hidden[1] if self.is_gated else y
            expected = layers[self.down](y + 1.0 if self.drops == "inner" else y)
            expected = expected + 1.0 if self.drops == "outer" else expected
        return agrees(partial(original_type(module).forward, clone, x), expected)

    def _first(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Call the layers before the activation; return the gate, and the factor that its activation multiplies."""
        layers: Any = module._modules
        z = layers[self.gate](x)
        if self.fused:
            first, last = z.chunk(2, dim=-1)
            return (first, last) if self.fused == "first" else (last, first)
        return (z,) if self.up is None else (z, layers[self.up](x))

    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> Tensor | None:
        """Compute a call with activation, gate and inner dropout in one op."""
        if not self.takes(module, *args, **kwargs) or self._casts(module, args[0]):
            return None
        op: Any = safe_kernels.gated_activation if self.is_gated else safe_kernels.activation
        layers = module._modules
        inner = layers[self.dropout] if self.drops == "inner" else None
        dropout_p = inner.p if inner is not None and inner.training else 0.0
        out = layers[self.down](op(*self._first(module, args[0]), self.kind, dropout_p=dropout_p))
        return layers[self.dropout](out) if self.drops == "outer" else out

    def _casts(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the module may cast the input of its last layer, as T5 does if that layer is in float32."""
        weight = getattr(module._modules[self.down], "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype == x.dtype:
            return False
        return not autocasts(x)


class _Marker(nn.Module):
    """Replaces a dropout in a trial, and shows its place."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1.0


def _candidates(linear: list[str], dropouts: list[str], known: dict[str, str]) -> Iterator[Mlp]:
    """Yield every assignment of roles; a plain MLP only with an inner dropout, which the activation cannot include."""
    places = [{"dropout": name, "drops": place} for name in dropouts for place in ("inner", "outer")]
    for place in [*places, {}]:
        for gate, *up, down in permutations(linear):
            if up:
                yield Mlp(gate, up[0], down, **known, **place)
                continue
            for fused in ("first", "last"):
                yield Mlp(gate, None, down, **known, fused=fused, **place)
            if place.get("drops") == "inner":
                yield Mlp(gate, None, down, **known, **place)
