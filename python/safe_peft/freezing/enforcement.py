"""Freezes adapters and keeps them frozen: in the model, in the optimizers' state and in the engine's buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..binding.adapters import Adapter
from ..binding.bind import Binding
from ..distributed import DistributedContext
from ..errors import BindingError
from .compile_support import allow_recompilations
from .config import SafeConfig
from .optimizer_state import Optimizers
from .schedule import rank


class FreezeEnforcer:
    """Freezes and restores adapters. The ledger records which adapters are frozen.

    Args:
        adapters: all adapters that may freeze.
        binding: the binding of their model.
        optimizers: the optimizers of the model.
        processes: the processes that train the model together.
        config: the options.

    Raises:
        BindingError: Two of the adapters share a trainable parameter, and one of them may freeze.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        binding: Binding,
        optimizers: Optimizers,
        processes: DistributedContext,
        config: SafeConfig,
    ) -> None:
        self._adapters, self._binding = adapters, binding
        self._optimizers, self._processes = optimizers, processes
        self._config = config
        _refuse_shared(adapters, config)

    def freeze(self, names: Sequence[str]) -> None:
        """Freeze adapters permanently.

        Args:
            names: the names of the adapters.
        """
        if names:
            self.freeze_again(names)
            self._optimizers.forget_directions()
            allow_recompilations(names, self._binding.blocks)

    def freeze_again(self, names: Sequence[str]) -> None:
        """Freeze adapters that were frozen before a restart. The optimizers' saved state is newer than that freeze.

        Args:
            names: the names of the adapters.
        """
        if not names:
            return
        self._processes.reshard()
        for adapter in self._named(names):
            adapter.freeze(keep_dropout=self._config.keep_dropout)
        self.reassert(names)
        self._processes.parameters_changed()

    def reassert(self, names: Iterable[str]) -> None:
        """Keep frozen adapters constant: AdamW would still move them by momentum and by an old gradient.

        Args:
            names: the names of the adapters.
        """
        for adapter in self._named(names):
            adapter.reassert()
            self._optimizers.forget(adapter.parameters())

    def restore(self, names: Iterable[str]) -> None:
        """Let adapters train again, as they did before.

        Args:
            names: the names of the adapters. This does not notify the engine.
        """
        for adapter in self._named(names):
            adapter.restore()
            self._optimizers.give_back(adapter.parameters())

    def recompute(self, blocks: Sequence[str] | None) -> None:
        """Set the blocks to recompute in backward, if `config.recompute` is "auto".

        Args:
            blocks: the names of the blocks; None changes nothing.
        """
        if self._config.recompute == "auto" and blocks is not None:
            self._binding.recompute.clear()
            self._binding.recompute.update(blocks)

    def _named(self, names: Iterable[str]) -> Iterator[Adapter]:
        wanted = set(names)
        return (adapter for adapter in self._adapters if adapter.name in wanted)


def _refuse_shared(adapters: Sequence[Adapter], config: SafeConfig) -> None:
    """If two adapters share a parameter, freezing one would stop the other, or training would change the frozen one."""
    owners: dict[int, str] = {}
    for adapter in adapters:
        for parameter in adapter.parameters():
            if not parameter.requires_grad:
                continue
            other = owners.setdefault(id(parameter), adapter.name)
            if other != adapter.name and rank(config, dict.fromkeys((other, adapter.name), 0.0)):
                raise BindingError(
                    f"{other} and {adapter.name} share a trainable parameter, so neither can freeze alone. Give each "
                    "its own parameter, or list both in never_freeze."
                )
