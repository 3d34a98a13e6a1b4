"""What can go wrong with an asset."""

from safe_peft.errors import SafeError


class AssetError(SafeError, RuntimeError):
    """A model or a data set cannot be fetched, or is not what it should be."""
