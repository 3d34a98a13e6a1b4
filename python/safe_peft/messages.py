"""What a user is told when something outside this program goes wrong."""

from __future__ import annotations

from .errors import SafeError

EXPECTED = (SafeError, OSError, ImportError)
"""What a user can mend: a wrong option or file, a full disk, a missing package."""


def sentence(error: Exception) -> str:
    """Put an expected error into one sentence.

    Args:
        error: one of `EXPECTED`.

    Example:
        >>> sentence(OSError(28, "No space left on device", "report.png"))
        'report.png: No space left on device.'
    """
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}."
    if isinstance(error, ImportError):
        return f"{error}. Run safe-peft doctor to see what is missing."
    return str(error)
