"""The parts of a transformer block that retain more than backward needs, and the block itself.

Parts are recognised by what they compute, not by their names. A part that is not recognised stays unchanged.
"""

from __future__ import annotations

from .base import Part
from .bind import PARTS, bind_blocks, parts_of, unrecognised
from .stack import transformer_blocks

__all__ = ["PARTS", "Part", "bind_blocks", "parts_of", "transformer_blocks", "unrecognised"]
