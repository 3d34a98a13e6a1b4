"""What optimizers know of adapters that froze, and how they forget it, wherever they are held."""

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
    """The optimizers of a training, most often one, each with those that stand around it.

    Args:
        given: one, or several where every parameter has its own (a step inside backward, for instance).
    """

    def __init__(self, given: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
        self.given: tuple[Any, ...] = tuple(cast(Iterable[Any], given)) if several else (given,)
        self.inner = tuple(unwrap_optimizer(optimizer) for optimizer in self.given)
        self._left_out: list[tuple[Any, nn.Parameter, dict[str, Any]]] = []

    @property
    def kinds(self) -> str:
        """The names of their types, each once."""
        return ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in self.inner))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything they train."""
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                yield from group["params"]

    def check(self, adapters: Sequence[Adapter]) -> None:
        """See that they train the adapters.

        Args:
            adapters: those to be scored and frozen. Of one that none of them trains a warning tells: it looks finished.

        Raises:
            BindingError: They train none of them.
        """
        trained = {id(p) for p in self.parameters()}
        still = [adapter.name for adapter in adapters if trained.isdisjoint(map(id, adapter.parameters()))]
        if still and len(still) < len(adapters):
            why = "optimizer: it does not train %d of the adapters (%s, ...), which will freeze first; give it their "
            logger.warning(why + "parameters, or set their requires_grad to False.", len(still), still[0])
        if len(still) == len(adapters):
            raise BindingError(
                "optimizer: it trains none of this model's adapters; make it from this model's parameters, and pass a "
                "list of all of them where parameters have optimizers of their own."
            )

    def admit(self, adapters: Sequence[Adapter]) -> None:
        """Train what trains again and was left out when the optimizer was made: with the others' options.

        Args:
            adapters: all of them.
        """
        own = {id(p): p for adapter in adapters for p in adapter.parameters() if p.requires_grad}
        trained = {id(p) for p in self.parameters()}
        missing = [p for key, p in own.items() if key not in trained]
        groups = [group for optimizer in self.inner for group in optimizer.param_groups]
        most = max(groups, key=lambda group: sum(id(p) in own for p in group["params"]), default=None)
        # A group that says something of each parameter cannot take more of them; then `check` warns.
        if most is not None and not any(isinstance(v, list) for key, v in most.items() if key != "params"):
            most["params"] += missing

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop what is held about parameters: by AdamW, by its 8-bit and paged kin, by a Lookahead around it."""
        parameters = list(parameters)
        for optimizer in self._layers():
            state = getattr(optimizer, "state", None)
            if _wants_every_gradient(optimizer):
                self._leave_out(optimizer, parameters)
            if not isinstance(state, MutableMapping) or isinstance(optimizer, torch.optim.LBFGS):
                continue
            dropped = [state.pop(parameter, None) for parameter in parameters]
            _release_pages(optimizer, [known for known in dropped if known])

    def _leave_out(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        """Take parameters out of an optimizer's groups, with what those say of each."""
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
        """Have parameters trained again that `forget` took out of their groups."""
        wanted = {id(parameter) for parameter in parameters}
        for group, parameter, entries in self._left_out:
            if id(parameter) in wanted:
                for key, value in entries.items():
                    group[key].append(value)
        self._left_out = [one for one in self._left_out if id(one[1]) not in wanted]

    def forget_directions(self) -> None:
        """Have LBFGS begin anew: its history is of all parameters at once, kept under the first one, and moves all."""
        for optimizer in self.inner:
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()

    def _layers(self) -> Iterator[Any]:
        for optimizer, inner in zip(self.given, self.inner, strict=True):
            while optimizer is not inner:
                yield optimizer
                optimizer = optimizer.optimizer
            yield inner


def _wants_every_gradient(optimizer: Any) -> bool:
    """PEFT's LoRA-FA multiplies the gradient of every lora_B in its groups, whether there is one or not."""
    return any(kind.__name__ == "LoraFAOptimizer" for kind in type(optimizer).__mro__)


def _release_pages(optimizer: Any, dropped: list[dict[str, Any]]) -> None:
    """Bitsandbytes lists the memory of its paged optimizers a second time."""
    pages = getattr(getattr(optimizer, "page_mng", None), "paged_tensors", None)
    if pages:
        gone = {id(value) for known in dropped for value in known.values()}
        pages[:] = [page for page in pages if id(page) not in gone]
