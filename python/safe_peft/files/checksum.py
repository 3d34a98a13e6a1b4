"""A checksum inside a dict of JSON values: an edited digit is noticed, which a file's form cannot show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import StateError


def signed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Add a checksum that tells an accident, or an edit, from what was written.

    Args:
        value: JSON values by name; an earlier checksum among them is replaced.

    Returns:
        The same with `sha256`, which depends neither on the order of names nor on how the file is laid out.

    Raises:
        StateError: `value` holds what JSON cannot.

    Example:
        >>> sorted(signed({"step": 3}))
        ['sha256', 'step']
    """
    rest = {name: item for name, item in value.items() if name != "sha256"}
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"state: it holds what JSON cannot ({error}); pass what state_dict returned.") from error
    return {**rest, "sha256": hashlib.sha256(text.encode("ascii")).hexdigest()}


def check_signed(value: Mapping[str, Any], where: str) -> None:
    """Refuse what is not as `signed` returned it.

    Args:
        value: JSON values by name.
        where: what they are, named in errors.

    Raises:
        StateError: The checksum is missing or another.

    Example:
        >>> check_signed(signed({"step": 3}), "state")
    """
    if signed(value)["sha256"] != value.get("sha256"):
        raise StateError(f"{where}: its sha256 is not that of its content; it is damaged or was edited.")
