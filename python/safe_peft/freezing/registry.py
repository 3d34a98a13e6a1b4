"""Functions that are registered under a name, so that an option of `SafeConfig` can select one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..errors import ConfigError

Entry = TypeVar("Entry")
Function = TypeVar("Function", bound=Callable[..., object])


class Registry(dict[str, Entry]):
    """The registered functions of one option, by name."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self._option = option

    def __missing__(self, name: str) -> Entry:
        raise ConfigError(f"{self._option}: expected one of {', '.join(sorted(self))}, got {name!r}.")

    def adding(self, name: str, entry: Callable[[Function], Entry]) -> Callable[[Function], Function]:
        """Return a decorator that registers `entry(function)` under a new name."""
        if name in self:
            raise ConfigError(f"{self._option} {name!r} is already registered; choose another name.")

        def register(function: Function) -> Function:
            self[name] = entry(function)
            return function

        return register
