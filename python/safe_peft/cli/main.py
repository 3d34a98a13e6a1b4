"""The command line: safe-peft finetune | plan | report | doctor."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EXPECTED, sentence
from .finetune import finetune
from .plan import plan

app = typer.Typer(
    name="safe-peft",
    help="Fine-tune PEFT adapters in less memory, and freeze the least important ones (SAFE).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_debug = False


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    global _debug
    _debug = debug


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that a user can fix into one sentence on standard error and exit status 2."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EXPECTED as error:
            if _debug:
                raise
            typer.echo(f"safe-peft: {sentence(error)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("safe-peft: interrupted; no incomplete files were kept.", err=True)
            raise typer.Exit(130) from None

    return guarded


app.command()(clear_errors(finetune))
app.command()(clear_errors(plan))


@app.command()
@clear_errors
def report(folder: Annotated[Path, typer.Argument(help="A folder with a report.json, or this file.")]) -> None:
    """Print the tables of a saved report, and write its figures and its HTML page again."""
    from ..report.report import FreezeReport
    from ..report.tables import plans_table, runs_table, verdict

    path = folder if folder.suffix == ".json" or folder.is_file() else folder / "report.json"
    found = FreezeReport.load(path)
    parts = [str(found)]
    if found.runs:
        parts.append(runs_table(found.runs))
        parts += filter(None, [verdict(found.runs)])
    if found.plans:
        parts.append(plans_table(found.plans))
    typer.echo("\n\n".join(parts))
    found.save_png(path.with_name("report.png"))
    found.save_memory_png(path.with_name("memory.png"))
    found.save_html(path.with_name("report.html"), picture=path.with_name("report.png"))
    typer.echo(f"drawn again: {path.with_name('report.png')}, {path.with_name('report.html')}")


@app.command()
@clear_errors
def doctor() -> None:
    """Check the installation: versions, the extension and the kernels of each device, with fixes for problems."""
    from .doctor import main as diagnose

    raise typer.Exit(diagnose())


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads are not safe with a forking data loader
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up on SIGTERM as on Ctrl-C
    app()


if __name__ == "__main__":
    main()
