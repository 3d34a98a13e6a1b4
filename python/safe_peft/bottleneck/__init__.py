"""Bottleneck adapters (Houlsby, Pfeiffer, parallel) as a method of PEFT, in plain PyTorch.

PEFT has no such method. Importing this package adds it, so import it before `PeftModel.from_pretrained` loads one too.
`safe_peft.bind` puts the adapters on `safe_kernels.bottleneck`.
"""

from __future__ import annotations

from .config import BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
