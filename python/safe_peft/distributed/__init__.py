"""Training on several processes: DDP, FSDP2 and tensor parallel, and how the processes agree."""

from .context import DistributedContext

__all__ = ["DistributedContext"]
