"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: Any, option: str = "memory_budget") -> int:
    """Read a number of bytes.

    Args:
        text: an int, or a number with a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024).
        option: named in errors.

    Raises:
        ConfigError: It is no such thing, or not above zero.

    Example:
        >>> parse_size("6GiB"), parse_size("800 MB")
        (6442450944, 800000000)
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
        size = int(float(match[1]) * _UNITS[unit]) if match and unit is not None else 0
    if size < 1:
        raise ConfigError(f'{option}: expected bytes above zero, such as "6GiB", "800MB" or an int, got {text!r}.')
    return size
