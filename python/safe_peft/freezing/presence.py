"""Checks that a freezer's adapters are still in the model: PEFT may delete them or unload the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..binding.adapters import Adapter
from ..distributed.wrappers import walk
from ..errors import BindingError


class Presence:
    """Remembers the place of each adapter in the model.

    Args:
        model: the model with the adapters.
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
        """Check that each adapter is in its place.

        Raises:
            BindingError: An adapter is gone; the message names it and the cause.

        Example:
            >>> Presence(nn.Linear(2, 2), []).check()
        """
        unloaded = [a.name for a, parent, name in self._places if parent and parent._modules.get(name) is not a.layer]
        if unloaded:
            raise BindingError(
                f"{_some(unloaded)}: no longer in the model. The model was unloaded, merged and unloaded, or its "
                "layers were replaced. Call detach() on this freezer; its report() still works."
            )
        deleted = [a.name for a, _, _ in self._places if not a.is_present()]
        if deleted:
            raise BindingError(
                f"{_some(deleted)}: the adapter was deleted from the layer. Call detach() on this freezer, and make a "
                "new one for the remaining adapters."
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more adapters" if len(names) > 1 else ""
    return f"{names[0]}{more}"
