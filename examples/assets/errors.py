"""The error of assets."""

from safe_peft.errors import SafeError


class AssetError(SafeError, RuntimeError):
    """A model or a data set cannot be fetched, or its content is wrong."""
