"""The parts of a transformer block that retain more than mathematics needs, one file a pattern, and the block itself.

Parts are recognised by what they compute, not by their names; what is not recognised stays as it is.
"""

from __future__ import annotations

from .base import Part
from .bind import PARTS, bind_blocks, parts_of, unrecognised
from .stack import transformer_blocks

__all__ = ["PARTS", "Part", "bind_blocks", "parts_of", "transformer_blocks", "unrecognised"]
