"""The releases of other libraries that tests distinguish."""

from __future__ import annotations

import transformers
from packaging.version import Version

TRANSFORMERS_4 = Version(transformers.__version__) < Version("5")
