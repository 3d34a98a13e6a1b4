"""The loss of a causal language model, computed in chunks of tokens."""

from .check import IGNORED
from .chunked import BY_NAME, Loss, chunked_loss, own_loss

__all__ = ["BY_NAME", "IGNORED", "Loss", "chunked_loss", "own_loss"]
