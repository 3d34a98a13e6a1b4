"""The commands."""

from __future__ import annotations

from ..errors import MissingPackageError, require


def main() -> None:
    """Run `safe-peft`, or report a missing package."""
    try:
        for package in ("typer", "rich", "datasets"):
            require(package, "cli")
    except MissingPackageError as error:
        raise SystemExit(f"safe-peft: {error}") from None
    from .main import main as run

    run()
