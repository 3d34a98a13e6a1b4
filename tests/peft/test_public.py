from __future__ import annotations

import subprocess
import sys

import pytest

import safe_peft


def test_the_public_surface_is_short_sorted_and_complete() -> None:
    assert safe_peft.__all__ == sorted(safe_peft.__all__) == dir(safe_peft)
    assert all(getattr(safe_peft, name) is not None for name in safe_peft.__all__)
    with pytest.raises(AttributeError, match="'safe_peft' has no attribute 'freeze'"):
        _ = safe_peft.freeze


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, safe_peft; print({'torch', 'peft', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
