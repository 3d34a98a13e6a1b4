"""An output folder whose old files are replaced only when the new ones are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError


@contextmanager
def staged(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Collect new files in a hidden folder inside `output`, and move them to their places if the block succeeds.

    If the block fails, nothing in `output` changes, and `output` is removed if it was made here.
    """
    output = Path(output)
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=output))
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written to ({error.strerror}); name another folder.") from error
    try:
        yield stage
        for path in sorted(stage.rglob("*")):
            target = output / path.relative_to(stage)
            target.mkdir(exist_ok=True) if path.is_dir() else path.replace(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):  # a folder is no longer empty
            for folder in made:
                folder.rmdir()
