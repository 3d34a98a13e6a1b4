"""MLPs that are bound as a whole: with a gate, or with a dropout between the activation and the last layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

import safe_kernels
from safe_kernels import reference

from ..class_swap import STATE, SwappedModule, autocasts, is_bound, original_type, own_forward
from .activations import activation_kind
from .base import Part, agrees, is_dropout, is_linear, is_plain, sample, small_linear, stand_in


class SafeMlp(SwappedModule):
    """An MLP whose activation runs in `safe_kernels.gated_activation` or `safe_kernels.activation`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's own formula."""
        if not is_bound(self):
            return own_forward(self, *args, **kwargs)
        part: Mlp = self.__dict__[STATE]
        if len(args) != 1 or kwargs or not is_plain(*args) or part.refusal(self) or part.casts(self, args[0]):
            return super().forward(*args, **kwargs)
        hidden = part.first(self, args[0])
        return part.rest(self, part.activate(self, hidden))


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

    mixin = SafeMlp
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
        """The op that computes the MLP."""
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
        x, layers = sample(5, 4), self._small_layers()
        children: dict[str, nn.Module] = {**layers, self.activation: stand_in(module._modules[self.activation])}  # type: ignore[arg-type]
        if self.dropout is not None:
            children[self.dropout] = _Marker()
        clone = stand_in(module, children=children)
        with torch.no_grad():
            z = layers[self.gate](x)
            if not self.is_gated:
                y = reference.activation(z, self.kind)
            else:
                gate, up = self.split(z) if self.fused else (z, layers[self.up](x))  # type: ignore[index]
                y = reference.activation(gate, self.kind) * up
            expected = layers[self.down](y + 1.0 if self.drops == "inner" else y)
            expected = expected + 1.0 if self.drops == "outer" else expected
        return agrees(lambda: original_type(module).forward(clone, x), expected)

    def _small_layers(self) -> dict[str, nn.Linear]:
        sizes = {self.gate: (4, 12 if self.fused else 6), self.down: (6, 4)}
        if self.up is not None:
            sizes[self.up] = (4, 6)
        return {name: small_linear(*size, seed) for seed, (name, size) in enumerate(sizes.items())}

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up from the output of a layer that computes both."""
        first, last = z.chunk(2, dim=-1)
        return (first, last) if self.fused == "first" else (last, first)

    def first(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Call the layers before the activation."""
        layers: Any = module._modules
        z = layers[self.gate](x)
        if not self.is_gated:
            return (z,)
        return self.split(z) if self.fused else (z, layers[self.up](x))

    def activate(self, module: nn.Module, hidden: tuple[Tensor, ...]) -> Tensor:
        """Compute the activation, gate and inner dropout in one op."""
        dropout: Any = module._modules[self.dropout] if self.drops == "inner" else None  # type: ignore[index]
        op: Any = safe_kernels.gated_activation if self.is_gated else safe_kernels.activation
        return op(*hidden, self.kind, dropout_p=dropout.p if dropout is not None and dropout.training else 0.0)

    def rest(self, module: nn.Module, y: Tensor) -> Tensor:
        """Call the last layer, and the dropout after it."""
        layers: Any = module._modules
        out = layers[self.down](y)
        return layers[self.dropout](out) if self.drops == "outer" else out

    def casts(self, module: nn.Module, x: Tensor) -> bool:
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
    places: list[dict[str, str]] = [
        {"dropout": name, "drops": place} for name in dropouts for place in ("inner", "outer")
    ]
    for place in [*places, {}]:
        for gate, *up, down in permutations(linear):
            if up:
                yield Mlp(gate, up[0], down, **known, **place)
                continue
            for fused in ("first", "last"):
                yield Mlp(gate, None, down, **known, fused=fused, **place)
            if place.get("drops") == "inner":
                yield Mlp(gate, None, down, **known, **place)
