"""Freezes adapters, and keeps them frozen: in the model, in what the optimizers know, and in the engine's buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..binding.adapters import Adapter
from ..binding.bind import Binding
from ..distributed import Engine
from ..errors import BindingError
from .compile_support import allow_recompilations
from .config import SafeConfig
from .optimizer_state import Optimizers
from .schedule import rank


class Holding:
    """Carries decisions out. Who is frozen is the ledger's to know.

    Args:
        adapters: whom decisions may be about.
        binding: of the model they are in.
        optimizers: those that train it.
        engine: the processes that train it together.
        config: the options.

    Raises:
        BindingError: Two of the adapters share a parameter that trains, and one of them may freeze.
    """

    def __init__(
        self, adapters: Sequence[Adapter], binding: Binding, optimizers: Optimizers, engine: Engine, config: SafeConfig
    ) -> None:
        self._adapters, self._binding = adapters, binding
        self._optimizers, self._engine = optimizers, engine
        self._config = config
        _refuse_shared(adapters, config)

    def freeze(self, names: Sequence[str]) -> None:
        """Freeze adapters for good.

        Args:
            names: theirs.
        """
        if names:
            self.freeze_again(names)
            self._optimizers.forget_directions()
            allow_recompilations(names, self._binding.blocks)

    def freeze_again(self, names: Sequence[str]) -> None:
        """Freeze adapters that were frozen before a restart: the optimizers' state is of a time after that.

        Args:
            names: theirs.
        """
        if not names:
            return
        self._engine.reshard()
        for adapter in self._named(names):
            adapter.freeze(keep_dropout=self._config.keep_dropout)
        self.hold(names)
        self._engine.parameters_changed()

    def hold(self, names: Iterable[str]) -> None:
        """Keep frozen adapters still: AdamW would go on moving them by their momentum and a gradient left over.

        Args:
            names: theirs.
        """
        for adapter in self._named(names):
            adapter.hold()
            self._optimizers.forget(adapter.parameters())

    def restore(self, names: Iterable[str]) -> None:
        """Let adapters train again, as they did before.

        Args:
            names: theirs. The engine is not told yet.
        """
        for adapter in self._named(names):
            adapter.restore()
            self._optimizers.give_back(adapter.parameters())

    def recompute(self, blocks: Sequence[str] | None) -> None:
        """Have blocks run again in backward, where the options leave it to a budget which.

        Args:
            blocks: their names; None leaves things as they are.
        """
        if self._config.recompute == "auto" and blocks is not None:
            self._binding.recompute.clear()
            self._binding.recompute.update(blocks)

    def _named(self, names: Iterable[str]) -> Iterator[Adapter]:
        wanted = set(names)
        return (adapter for adapter in self._adapters if adapter.name in wanted)


def _refuse_shared(adapters: Sequence[Adapter], config: SafeConfig) -> None:
    """To freeze one of two adapters that share a parameter would stop the other's, or change the frozen one."""
    owners: dict[int, str] = {}
    for adapter in adapters:
        for parameter in adapter.parameters():
            if not parameter.requires_grad:
                continue
            other = owners.setdefault(id(parameter), adapter.name)
            if other != adapter.name and rank(config, dict.fromkeys((other, adapter.name), 0.0)):
                raise BindingError(
                    f"{other} and {adapter.name} share a parameter that trains, so neither can freeze by itself; give "
                    "each its own, or name both in never_freeze."
                )
