"""PEFT's `lora.Linear` with `safe_kernels.lora` for its adapter. The op reads only the output of the base layer.

Over a plain nn.Linear the whole layer is one op, `safe_kernels.lora_linear`, or `safe_kernels.dora` (dora.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

import safe_kernels
from safe_kernels import AdapterStatistics

from ..class_swap import STATE, autocasts, is_hooked, is_transformed, original_type, own_forward
from ..code import own_method, watched
from . import dora
from .base import FLOATS, PARAMETERS, TENSORS, Adapter, LayerState, active_keys, register_adapter
from .observed import ObservedLayer, aside
from .score_inputs import OptimizerStep, ScoreInputs

DROPOUTS = frozenset({nn.Dropout, nn.Identity})
_CALLED = ("forward", "__call__", "_cast_input_dtype")
_METHODS: dict[type, tuple[Any, ...]] = {}
ROUTING = ("adapter_names", *VARIANT_KWARG_KEYS)


def refusal(layer: PeftLinear, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return why a call of this layer must take PEFT's own path.

    Every forward calls this function before its kernel. So it reads only types and flags, never values, and it reads
    the dicts of modules directly, because nn.Module's attribute lookup costs more than all these checks.

    Returns:
        The reason in a few words, or None if our ops can compute the call. Without `args`, only the layer is checked.
    """
    keys = active_keys(layer, layer._modules["lora_A"]._modules)
    if (reason := refuse_state(layer, keys, kwargs)) is not None:
        return reason
    if len(keys) > 1 and (reason := _refuse_several(layer, keys)) is not None:
        return reason
    if keys[0] in layer.lora_variant:
        rest = {name: value for name, value in (kwargs or {}).items() if name not in ROUTING}
        if (reason := dora.refusal(layer, keys[0], args, rest)) is not None:
            return reason
    if (reason := _refuse_code(layer)) is not None:
        return reason
    for key in keys:
        if (reason := refuse_adapter(layer, key) or _refuse_input(layer, key, args)) is not None:
            return reason
    return None


def refuse_state(layer: Any, keys: list[str], kwargs: Mapping[str, Any] | None) -> str | None:
    """Refuse a LoRA layer of any type of base layer by its active adapters, and by where the call goes."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "adapters are merged into the base weight"
    if kwargs:
        for name in ROUTING:
            if kwargs.get(name) is not None:
                return f"the call passes {name}"
    if not keys:
        return "no active adapter in this layer"
    if "forward" in layer.__dict__:
        return "forward is replaced on the layer itself (device hooks, for instance)"
    return None


def _refuse_several(layer: PeftLinear, keys: list[str]) -> str | None:
    """Refuse several active adapters if one of them changes the input of the next."""
    if any(key in layer.lora_variant for key in keys):
        return "several adapters are active, and one of them is a variant of LoRA"
    if len({layer.lora_A[key].weight.dtype for key in keys}) > 1:
        return "several adapters of different dtypes are active, between which PEFT rounds the input"
    return None


def _refuse_code(layer: PeftLinear) -> str | None:
    """Refuse a layer if a method of PEFT's or PyTorch's class is replaced: the ops compute the original methods."""
    kind: Any = original_type(layer)
    linear, dropout, identity = nn.Linear.forward, nn.Dropout.forward, nn.Identity.forward
    called = (kind.forward, kind.__call__, kind._cast_input_dtype, linear, dropout, identity)
    if called != _METHODS.get(kind) and (reason := _look_at(kind, called)) is not None:
        return reason
    return "hooks on the calls of all modules, lora_A and lora_B among them" if watched() else None


def _look_at(kind: type, called: tuple[Any, ...]) -> str | None:
    """Compare the methods that a layer calls, at its class's first call and after a method was replaced."""
    methods = [(kind, name) for name in _CALLED] + [
        (child, "forward") for child in (nn.Linear, nn.Dropout, nn.Identity)
    ]
    known = _METHODS.get(kind) or tuple(own_method(owner, name) for owner, name in methods)
    for (owner, name), method, now in zip(methods, known, called, strict=True):
        if method is not now:
            return f"{owner.__name__}.{name} is replaced"
    _METHODS[kind] = known
    return None


def refuse_adapter(layer: Any, key: str, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Refuse an adapter that does more than an ordinary dropout and two layers of this kind."""
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[key], modules["lora_B"]._modules[key]
    dropout = modules["lora_dropout"]._modules[key]
    if type(lora_A) is not kind or type(lora_B) is not kind:
        return f"adapter is made of {type(lora_A).__name__} and {type(lora_B).__name__}, not of nn.{kind.__name__}"
    A, B = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    if A is None or B is None:
        return "lora_A or lora_B is not an ordinary parameter"
    if lora_A._parameters["bias"] is not None:
        return "lora_A has a bias"
    bias = lora_B._parameters["bias"]
    if bias is not None and (type(bias) not in TENSORS or bias.dtype != B.dtype):
        return "bias of lora_B is not an ordinary parameter with lora_B's dtype"
    if bias is not None and key in layer.lora_variant:
        return "a variant of LoRA with a bias"
    if A.dtype not in FLOATS or A.dtype != B.dtype:
        return f"adapter dtype {str(A.dtype).removeprefix('torch.')} and {str(B.dtype).removeprefix('torch.')}"
    scaling = layer.scaling[key]
    if isinstance(scaling, Tensor):
        return "scaling is a tensor (prepared for compiled hotswapping), which the op would treat as a constant"
    if not isinstance(scaling, float | int):
        return f"scaling is a {type(scaling).__name__}"
    if type(dropout) not in DROPOUTS:
        return f"dropout module {type(dropout).__name__} is not nn.Dropout"
    if dropout.__dict__.get("inplace", False):
        return "lora_dropout works in place"
    if is_hooked(lora_A) or is_hooked(lora_B) or is_hooked(dropout):
        return "hooks on lora_A, lora_B or lora_dropout, which the fast path would not run"
    return None


def _refuse_input(layer: PeftLinear, key: str, args: tuple[Any, ...]) -> str | None:
    if not args:
        return None
    x = args[0]
    if (reason := refuse_tensor(x)) is not None:
        return reason
    lora_B = layer._modules["lora_B"]._modules[key]._parameters
    if x.dtype != lora_B["weight"].dtype:
        if not layer.cast_input_dtype_enabled:
            return "input and adapter differ in dtype, and casting is switched off"
        if lora_B["bias"] is not None and not autocasts(x):
            return "adapter has a bias (lora_bias) of another dtype than the input"
    return None


def refuse_tensor(x: Any) -> str | None:
    """Refuse an input that no op takes."""
    if is_transformed():
        return "torch.func or torch.jit.trace is active, which supports only PyTorch's own ops"
    if type(x) not in TENSORS:
        return f"input is a {type(x).__name__}, not a plain tensor"
    if x.dtype not in FLOATS or x.layout is not torch.strided:
        return f"input is {str(x.dtype).removeprefix('torch.')}, {str(x.layout).removeprefix('torch.')}"
    return None


def _plain(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a base layer that computes only ``x W' + bias``; None if its call does more."""
    if type(base) is not nn.Linear or is_hooked(base) or autocasts(x):
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias", x)
    if weight is None or type(weight) not in PARAMETERS or weight.dtype != x.dtype:
        return None
    if bias is not None and (type(bias) not in PARAMETERS or bias.dtype != x.dtype):
        return None
    return weight, bias


class Factors(NamedTuple):
    """The parts of one adapter that an op reads."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float


class SafeLoraLinear(ObservedLayer):
    """PEFT's LoRA layer; `safe_kernels.lora` computes its adapter if `refusal` returns None."""

    scaling: dict[str, float]
    lora_variant: dict[str, Any]
    _refusal = staticmethod(refusal)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: LayerState | None = self.__dict__.get(STATE)
        if state is None:
            return own_forward(self, x, *args, **kwargs)
        if self._refusal(self, (x, *args), kwargs) is not None:
            return super().forward(x, *args, **kwargs)
        own: Any = self._modules
        keys = active_keys(self, own["lora_A"]._modules)
        compiling = torch.compiler.is_compiling()
        statistics = observed(state, keys, x) if self.training and not compiling else {}  # scoring is not compiled
        is_dora, apart = keys[0] in self.lora_variant, len(statistics) > 0 and len(keys) > 1
        plain = None if args or kwargs or is_dora or apart else _plain(own["base_layer"], x)
        if not compiling and not apart:
            state.fused = plain is not None
        out: Any = plain
        if plain is None and not is_dora:
            named = {name: value for name, value in kwargs.items() if name not in ROUTING}
            out = self.base_layer(x, *args, **named)
        factors = [self._factors(key, key in state.frozen) for key in keys]
        try:
            if is_dora:
                A, B, _, scaling, dropout_p = factors[0]
                magnitude = dora.magnitude_of(self, keys[0], keys[0] in state.frozen)
                return dora.forward(self, x, (A, B, magnitude, scaling), dropout_p, statistics.get(keys[0]))
            if apart:  # each adapter is compared with the base layer's output, so it needs a call of its own
                with aside(self, (x,)):
                    for key, adapter in zip(keys, factors, strict=True):
                        if key in statistics:
                            _add(x, out, adapter, statistics[key])
                statistics = {}
            for key, adapter in zip(keys, factors, strict=True):
                out = _add(x, out, adapter, statistics.get(key))
            return out
        except (TypeError, ValueError) as refused:
            return as_peft(super().forward, refused, x, *args, **kwargs)

    def _factors(self, key: str, is_frozen: bool) -> Factors:
        own: Any = self._modules
        lora_A, lora_B, dropout = (own[name]._modules[key] for name in ("lora_A", "lora_B", "lora_dropout"))
        found = lora_A.weight, lora_B.weight, lora_B.bias
        if is_frozen:  # PEFT may have set requires_grad of a frozen adapter again
            found = tuple(p.detach() if p is not None and p.requires_grad else p for p in found)
        drops = dropout.training and type(dropout) is nn.Dropout
        return Factors(*found, self.scaling[key], dropout.p if drops else 0.0)


def observed(state: LayerState, keys: list[str], x: Tensor) -> dict[str, AdapterStatistics]:
    """Return the sums to add to, by the adapter; {} except in a scoring step."""
    if not state.observe:
        return {}
    found = {key: state.observe[key](x) for key in keys if key in state.observe}
    return {key: statistics for key, statistics in found.items() if statistics is not None}


def _add(
    x: Tensor, base: Tensor | tuple[Tensor, Tensor | None], adapter: Factors, statistics: AdapterStatistics | None
) -> Tensor:
    """Add an adapter to a layer's output so far, or to that of the base layer with this weight and bias."""
    A, B, bias, scaling, dropout_p = adapter
    shift = None if bias is None else scaling * bias
    if isinstance(base, Tensor):
        out = base if shift is None else base + shift.to(base.dtype)
        return safe_kernels.lora(x, out, A, B, scaling, dropout_p=dropout_p, statistics=statistics)
    weight, own = base
    if own is not None:
        shift = own if shift is None else own + shift
    return safe_kernels.lora_linear(x, weight, shift, A, B, scaling, dropout_p=dropout_p, statistics=statistics)


def as_peft(forward: Callable[..., Tensor], refused: Exception, *args: Any, **kwargs: Any) -> Tensor:
    """Let PEFT's own code raise the error for invalid arguments, with the type that PEFT's users expect."""
    try:
        return forward(*args, **kwargs)
    except Exception as error:
        if len(error.args) == 1:
            error.args = (f"{error}; {refused}",)
        raise


@register_adapter
class LoraAdapter(Adapter):
    """One LoRA adapter of one layer."""

    layer_type: ClassVar[type[nn.Module]] = PeftLinear
    mixin: ClassVar[type[ObservedLayer]] = SafeLoraLinear
    refusal = staticmethod(refusal)
    layer: Any

    @staticmethod
    def op(layer: nn.Module) -> str:
        """Return the op that computes the layer on the fast path."""
        own: Any = layer
        if any(key in own.lora_variant for key in active_keys(own, own.lora_A)):
            return "dora"
        state = layer.__dict__.get(STATE)
        return "lora_linear" if state is not None and state.fused else "lora"

    def traits(self) -> dict[str, Any]:
        return {**super().traits(), "r": self.layer.r[self.key], "scaling": self.scaling()}

    def dropouts(self) -> list[nn.Dropout]:
        dropout = self.layer.lora_dropout[self.key]
        return [dropout] if isinstance(dropout, nn.Dropout) else []

    def evidence(self, statistics: AdapterStatistics | None = None) -> ScoreInputs:
        step = OptimizerStep()
        return ScoreInputs(
            statistics=statistics,
            lora_A=lambda: self.matrix_A(self.pair()[0].detach()),
            lora_B=lambda: self.matrix_B(self.pair()[1].detach()),
            scaling=self.scaling(),
            base_weight=self.base_weight,
            grad_A=lambda: _changed(step.grad(self.pair()[0]), self.matrix_A),
            grad_B=lambda: _changed(step.grad(self.pair()[1]), self.matrix_B),
            dequantise=self.dequantise,
            update_A=lambda: _changed(step.update(self.pair()[0]), self.matrix_A),
            update_B=lambda: _changed(step.update(self.pair()[1]), self.matrix_B),
            optimizer_state_A=lambda: step.state(self.pair()[0]),
            optimizer_state_B=lambda: step.state(self.pair()[1]),
            optimizer=step,
        )

    def is_present(self) -> bool:
        lora_A = self.layer._modules.get("lora_A")
        return (lora_A is not None and self.key in lora_A._modules) or super().is_present()

    def scaling(self) -> float:
        """Return the factor of the adapter's output."""
        return float(self.layer.scaling[self.key])

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the adapter's two parameters."""
        return self.layer.lora_A[self.key].weight, self.layer.lora_B[self.key].weight

    def matrix_A(self, A: Tensor) -> Tensor:
        """Return lora_A or its gradient as [..., r, d_in]: one matrix, or a stack of matrices."""
        return A

    def matrix_B(self, B: Tensor) -> Tensor:
        """Return lora_B or its gradient as [..., d_out, r]; its product with `matrix_A` changes the weight."""
        return B

    def base_weight(self) -> Tensor | None:
        """Return the weight that the adapter is added to; None if it cannot be read."""
        weight = getattr(self.layer.get_base_layer(), "weight", None)
        return weight.detach() if isinstance(weight, Tensor) and weight.dtype in FLOATS else None

    def dequantise(self) -> Tensor | None:
        """Return the dequantised base weight; None if there is nothing to dequantise."""
        return None


def _changed(grad: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if grad is None else change(grad)
