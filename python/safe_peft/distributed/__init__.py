"""Training on several processes: which of them train together, what they agree on, and what their engines must know."""

from .engine import Engine

__all__ = ["Engine"]
