"""Freezes adapters and keeps them frozen: in the model, in the optimizers' state and in the engine's buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from ..binding.adapters import Adapter
from ..binding.bind import Binding
from ..distributed import DistributedContext
from ..distributed.wrappers import walk
from ..errors import BindingError
from .compile_support import allow_recompilations
from .config import SafeConfig
from .optimizer_state import Optimizers
from .schedule import rank


class FreezeEnforcer:
    """Freezes and restores adapters. The ledger records which adapters are frozen."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        binding: Binding,
        optimizers: Optimizers,
        processes: DistributedContext,
        config: SafeConfig,
    ) -> None:
        self._adapters, self._binding = adapters, binding
        self._optimizers, self._processes = optimizers, processes
        self._config = config
        parents = {id(child): (parent, n) for _, parent in walk(model) for n, child in parent._modules.items()}
        self._places = [(adapter, *parents[id(adapter.layer)]) for adapter in adapters if id(adapter.layer) in parents]
        self._refuse_shared()

    def _refuse_shared(self) -> None:
        """Refuse adapters that share a parameter: freezing one would stop the other, or the frozen one would change."""
        owners: dict[int, str] = {}
        for adapter in self._adapters:
            for parameter in (p for p in adapter.parameters() if p.requires_grad):
                other = owners.setdefault(id(parameter), adapter.name)
                if other != adapter.name and rank(self._config, dict.fromkeys((other, adapter.name), 0.0)):
                    raise BindingError(
                        f"{other} and {adapter.name} share a trainable parameter, so neither can freeze alone. Give "
                        "each its own parameter, or list both in never_freeze."
                    )

    def check_present(self) -> None:
        """Raise if an adapter is no longer in the model: PEFT may delete adapters, or unload the model."""
        if unloaded := [a.name for a, parent, name in self._places if parent._modules.get(name) is not a.layer]:
            raise BindingError(
                f"{_some(unloaded)}: no longer in the model. The model was unloaded, merged and unloaded, or its "
                "layers were replaced. Call detach() on this freezer; its report() still works."
            )
        if deleted := [adapter.name for adapter in self._adapters if not adapter.is_present()]:
            raise BindingError(
                f"{_some(deleted)}: the adapter was deleted from the layer. Call detach() on this freezer, and make a "
                "new one for the remaining adapters."
            )

    def freeze(self, names: Sequence[str]) -> None:
        """Freeze adapters permanently."""
        if names:
            self.freeze_again(names)
            self._optimizers.forget_directions()
            allow_recompilations(names, self._binding.blocks)

    def freeze_again(self, names: Sequence[str]) -> None:
        """Freeze adapters that were frozen before a restart. The optimizers' state was saved after that event."""
        if not names:
            return
        self._processes.reshard()
        for adapter in self._named(names):
            adapter.freeze(keep_dropout=self._config.keep_dropout)
        self.reassert(names)
        self._processes.parameters_changed()

    def reassert(self, names: Iterable[str]) -> None:
        """Keep frozen adapters constant: AdamW would still move them by momentum and by an old gradient."""
        for adapter in self._named(names):
            adapter.reassert()
            self._optimizers.forget(adapter.parameters())

    def restore(self, names: Iterable[str]) -> None:
        """Let adapters train again, as they did before; this does not notify the engine."""
        for adapter in self._named(names):
            adapter.restore()
            self._optimizers.give_back(adapter.parameters())

    def recompute(self, blocks: Sequence[str] | None) -> None:
        """Set the blocks to recompute in backward, if `config.recompute` is "auto"; None changes nothing."""
        if self._config.recompute == "auto" and blocks is not None:
            self._binding.recompute = blocks

    def _named(self, names: Iterable[str]) -> Iterator[Adapter]:
        wanted = set(names)
        return (adapter for adapter in self._adapters if adapter.name in wanted)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more adapters" if len(names) > 1 else names[0]
