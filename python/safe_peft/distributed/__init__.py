"""Training on several processes: DDP, FSDP2 and tensor parallel, and how the processes agree."""

from .engine import Engine

__all__ = ["Engine"]
