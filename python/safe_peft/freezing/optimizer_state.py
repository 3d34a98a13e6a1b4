"""Removes the state of frozen adapters from optimizers, and from the wrappers around them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..binding.adapters import Adapter
from ..distributed.wrappers import unwrap_optimizer
from ..errors import BindingError

logger = logging.getLogger(__name__)


class Optimizers:
    """The optimizers of a training: one, or several if parameters have their own, to step inside backward."""

    def __init__(self, given: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
        self.given: tuple[Any, ...] = tuple(cast(Iterable[Any], given)) if several else (given,)
        self.inner = tuple(unwrap_optimizer(optimizer) for optimizer in self.given)
        self._left_out: list[tuple[Any, nn.Parameter, dict[str, Any]]] = []

    @property
    def kinds(self) -> str:
        """The names of their types, without repetition."""
        return ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in self.inner))

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that they train."""
        return (p for optimizer in self.inner for group in optimizer.param_groups for p in group["params"])

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise if they train none of the adapters to score and freeze, and warn if they do not train some of them."""
        trained = {id(p) for p in self.parameters()}
        still = [adapter.name for adapter in adapters if trained.isdisjoint(map(id, adapter.parameters()))]
        if still and len(still) < len(adapters):
            why = "optimizer: it does not train %d of the adapters (%s, ...), so these freeze first; add their "
            logger.warning(why + "parameters to it, or set their requires_grad to False.", len(still), still[0])
        if len(still) == len(adapters):
            raise BindingError(
                "optimizer: it trains none of this model's adapters; make it from this model's parameters. If several "
                "optimizers share the parameters, pass a list of all optimizers."
            )

    def admit(self, adapters: Sequence[Adapter]) -> None:
        """Add trainable parameters that were frozen when the optimizer was made, with the options of the others."""
        own = {id(p): p for adapter in adapters for p in adapter.parameters() if p.requires_grad}
        trained = {id(p) for p in self.parameters()}
        missing = [p for key, p in own.items() if key not in trained]
        groups = [group for optimizer in self.inner for group in optimizer.param_groups]
        most = max(groups, key=lambda group: sum(id(p) in own for p in group["params"]), default=None)
        # A group with lists of options per parameter cannot take more parameters; then `check` warns.
        if most is not None and not any(isinstance(v, list) for key, v in most.items() if key != "params"):
            most["params"] += missing

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop the state of parameters in AdamW, in its 8-bit and paged variants, and in a Lookahead around it."""
        parameters = list(parameters)
        for optimizer in self._layers():
            state = getattr(optimizer, "state", None)
            # PEFT's LoRA-FA reads the gradient of every lora_B in its groups, and fails if it is None.
            if any(kind.__name__ == "LoraFAOptimizer" for kind in type(optimizer).__mro__):
                self._leave_out(optimizer, parameters)
            if not isinstance(state, MutableMapping) or isinstance(optimizer, torch.optim.LBFGS):
                continue
            dropped = [state.pop(parameter, None) or {} for parameter in parameters]
            # bitsandbytes has a second list of the memory of its paged optimizers.
            if pages := getattr(getattr(optimizer, "page_mng", None), "paged_tensors", None):
                gone = {id(value) for known in dropped for value in known.values()}
                pages[:] = [page for page in pages if id(page) not in gone]

    def _leave_out(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        """Remove parameters from an optimizer's groups, together with their options."""
        gone = {id(parameter) for parameter in parameters}
        for group in optimizer.param_groups:
            kept = [id(p) not in gone for p in group["params"]]
            if all(kept):
                continue
            lists = {key: list(v) for key, v in group.items() if isinstance(v, list) and len(v) == len(kept)}
            for key, values in lists.items():
                group[key][:] = [value for value, keep in zip(values, kept, strict=True) if keep]
            for index, parameter in enumerate(lists["params"]):
                if not kept[index]:
                    self._left_out.append((group, parameter, {key: values[index] for key, values in lists.items()}))
                    name = lists["names"][index]
                    optimizer.state.pop(name[: name.find("lora")] + "lora", None)

    def give_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """Return parameters to the groups that `forget` removed them from."""
        wanted = {id(parameter) for parameter in parameters}
        for group, parameter, entries in self._left_out:
            if id(parameter) in wanted:
                for key, value in entries.items():
                    group[key].append(value)
        self._left_out = [one for one in self._left_out if id(one[1]) not in wanted]

    def forget_directions(self) -> None:
        """Reset LBFGS: its history covers all parameters at once, so it would move frozen ones too."""
        for optimizer in self.inner:
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()

    def _layers(self) -> Iterator[Any]:
        for optimizer, inner in zip(self.given, self.inner, strict=True):
            while optimizer is not inner:
                yield optimizer
                optimizer = optimizer.optimizer
            yield inner
