"""Whether the adapters that a freezer decides about are still there: PEFT may delete them or unload the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..binding.adapters import Adapter
from ..distributed.wrappers import walk
from ..errors import BindingError


class Presence:
    """Where adapters stood when this was made.

    Args:
        model: the model they are in.
        adapters: the adapters.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        wanted = {id(adapter.layer) for adapter in adapters}
        parents = {
            id(child): (module, name)
            for _, module in walk(model)
            for name, child in module._modules.items()
            if id(child) in wanted
        }
        self._places = [(adapter, *parents.get(id(adapter.layer), (None, ""))) for adapter in adapters]

    def check(self) -> None:
        """See that each is where it was.

        Raises:
            BindingError: One is gone; says which, and what took it.

        Example:
            >>> Presence(nn.Linear(2, 2), []).check()
        """
        unloaded = [a.name for a, parent, name in self._places if parent and parent._modules.get(name) is not a.layer]
        if unloaded:
            raise BindingError(
                f"{_some(unloaded)}: no longer in the model, which was unloaded, merged and unloaded, or given other "
                "layers; detach() this freezer, whose report() stays."
            )
        deleted = [a.name for a, _, _ in self._places if not a.is_present()]
        if deleted:
            raise BindingError(
                f"{_some(deleted)}: its adapter was deleted from the layer; detach() this freezer, and make a new one "
                "for those that are left."
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more adapters" if len(names) > 1 else ""
    return f"{names[0]}{more}"
