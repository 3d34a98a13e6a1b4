"""What is optional is missed by the functions that need it alone, and they say in one sentence how to get it."""

from __future__ import annotations

import subprocess
import sys

import forks
import pytest
import torch
from torch import nn

import safe_peft
from safe_peft import FreezeReport, MissingPackageError

EXTRAS = ("typer", "rich", "datasets", "matplotlib")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def train() -> tuple[int, bool, int]:
    forks.forget("safe_peft", "peft", *EXTRAS)
    sys.modules |= dict.fromkeys(EXTRAS)  # type: ignore[arg-type] # None cannot be imported
    from peft import LoraConfig, get_peft_model

    import safe_peft

    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(layers, LoraConfig(target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    freezer = safe_peft.AdapterFreezer(model, optimizer, safe_peft.SafeConfig(target_fraction=0.5), total_steps=6)
    for _ in range(6):
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        freezer.step()
    report = freezer.report()
    return len(report.adapters), safe_peft.explain(model) is not None, len(str(report).splitlines())


def test_a_training_needs_no_extra() -> None:
    done = forks.call(train)
    assert done.value == (2, True, 4), done.error


def test_the_kernels_need_torch_alone() -> None:
    done = run(
        "import sys; sys.modules |= dict.fromkeys(('transformers', 'peft', 'accelerate', 'safetensors', 'triton'))\n"
        "import torch, safe_kernels; print(safe_kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).shape)"
    )
    assert done.stdout.strip() == "torch.Size([2, 4])", done.stderr


@pytest.mark.parametrize("package", ["typer", "rich", "datasets"])
def test_the_command_says_what_is_missing(package: str) -> None:
    done = run(f"import sys; sys.modules['{package}'] = None\nfrom safe_peft.cli import main; main()")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"safe-peft: {package} is not installed. Install what this function needs: pip install 'safe-kernels[cli]'"
    )


def test_a_picture_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib is not installed\. .*'safe-kernels\[report\]'"):
        FreezeReport("m", {}, 1, ()).save_png("report.png")
    assert issubclass(MissingPackageError, ImportError) and safe_peft.MissingPackageError is MissingPackageError
