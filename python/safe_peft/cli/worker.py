"""A training run in a process of its own, so that its peak of memory is its own and no run warms up another."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import EXPECTED, SafeError, sentence
from ..files import jsonio
from ..finetune.config import FinetuneConfig
from ..report.report import FreezeReport


def run_isolated(config: FinetuneConfig) -> FreezeReport:
    """Run `finetune(config)` in a fresh process, which shows its progress where this one does.

    Args:
        config: what to train, on what, and how.

    Returns:
        The report of the run.

    Raises:
        SafeError: The run failed, with its own reason.

    Example:
        >>> run_isolated(FinetuneConfig("minilm", "train.csv", "eval.csv"))  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder, "task.json"), Path(folder, "result.json")
        jsonio.write_json(task, config)
        code = subprocess.run([sys.executable, "-m", __name__, str(task), str(result)], check=False).returncode
        if not result.exists():
            raise SafeError(f"the {config.label} run {_death(code)}; nothing of it was kept.")
        answer = jsonio.read_json(result)
    if "error" in answer:
        raise SafeError(answer["error"])
    return FreezeReport.from_dict(answer)


def _death(code: int) -> str:
    if code == -9:
        return "was killed by the system, most likely for want of memory (try a smaller --batch-size)"
    return f"was stopped by signal {-code}" if code < 0 else f"ended with exit code {code}, as said above"


def main(task: str, result: str) -> None:
    """Do the work of the process that `run_isolated` starts.

    Args:
        task: the file that holds the configuration.
        result: the file to write the report to, or the reason why there is none.

    Example:
        >>> main("task.json", "result.json")  # doctest: +SKIP
    """
    from ..finetune.run import finetune

    try:
        answer = finetune(jsonio.decode(FinetuneConfig, jsonio.read_json(task), "task")).to_dict()
    except EXPECTED as error:
        answer = {"error": sentence(error)}
    jsonio.write_json(result, answer)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:  # the parent was interrupted as well, and says so
        sys.exit(130)
    except EXPECTED as error:  # not even the reason could be written
        sys.exit(f"safe-peft: {sentence(error)}")
