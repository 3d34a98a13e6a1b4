"""The errors this package raises; each message names what is wrong and how to fix it."""

from __future__ import annotations

from importlib import import_module


class SafeError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SafeError, ValueError):
    """An option has a value that cannot work."""


class BindingError(SafeError, RuntimeError):
    """A model, its adapters or its optimizer cannot be bound."""


class StateError(SafeError, ValueError):
    """A saved state or report is damaged, or belongs to something else."""


class ScoreError(SafeError, RuntimeError):
    """Adapters cannot be scored: NaN or Inf reached a score and the options say to stop, or it is no number."""


class PlanError(SafeError, RuntimeError):
    """A model's memory cannot be planned: it does not run without values, or is not known how to be called."""


class MissingPackageError(SafeError, ImportError):
    """An optional package is not installed."""


EXPECTED = (SafeError, OSError, ImportError)
"""What a user can fix: a wrong option or file, a full disk, a missing package."""


def require(package: str, extra: str) -> None:
    """Raise `MissingPackageError` if an optional package is not installed; `extra` of safe-kernels installs it."""
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingPackageError(
            f"{package} is not installed. Install what this function needs: pip install 'safe-kernels[{extra}]'"
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error of another library, which may print pages.

    Example:
        >>> first_line(ValueError("no such file")), first_line(KeyError())
        ('no such file', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def sentence(error: Exception) -> str:
    """Put an error that is one of `EXPECTED` into one sentence.

    Example:
        >>> sentence(OSError(28, "No space left on device", "report.png"))
        'report.png: No space left on device.'
    """
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}."
    if isinstance(error, ImportError) and not isinstance(error, SafeError):
        return f"{error}. Run safe-peft doctor to see what is missing."
    return str(error)
