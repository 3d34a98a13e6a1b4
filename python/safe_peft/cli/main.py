"""The command line: safe-peft finetune | plan | demo | report | doctor."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import EXPECTED, sentence
from .finetune import finetune
from .plan import plan

app = typer.Typer(
    name="safe-peft",
    help="Fine-tune LoRA adapters and freeze those that change least: SAFE, on kernels that retain less.",
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
    """Turn what a user can fix into one sentence on standard error and exit status 2.

    Args:
        command: a command's function.

    Example:
        >>> guarded = clear_errors(lambda: None)
    """

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
            typer.echo("safe-peft: interrupted; nothing half-made was kept.", err=True)
            raise typer.Exit(130) from None

    return guarded


app.command()(clear_errors(finetune))
app.command()(clear_errors(plan))


@app.command()
@clear_errors
def demo(
    output: Annotated[str, typer.Option(help="Folder for the report.")] = "runs/demo",
    model: Annotated[str, typer.Option(help="minilm, mpnet, a folder or a hub id.")] = "minilm",
    methods: Annotated[
        str, typer.Option(help="Some of stock, bind (fast path, no freezing), safe, bytes and random, with commas.")
    ] = "stock,safe,random",
    rows: Annotated[int, typer.Option(help="Training sentences, at most 8,566.")] = 5120,
    test_rows: Annotated[int, typer.Option(help="Held-out sentences, at most 2,000.")] = 2000,
    epochs: Annotated[int, typer.Option(help="Passes over the training sentences.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-3,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before the adapters.")] = 0.1,
    target_fraction: Annotated[float, typer.Option(help="Share of the adapters, or bytes, to freeze.")] = 0.75,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="Repeat over this many seeds: mean and standard deviation.")] = 1,
) -> None:
    """Compare stock PEFT, SAFE and freezing at random on film reviews; takes minutes."""
    from ..report.comparison import verdict
    from ..report.tables import plans_table, runs_table
    from . import demo as comparison

    config = comparison.DemoConfig(
        output=output,
        model=model,
        methods=tuple(name.strip() for name in methods.split(",")),
        rows=rows,
        test_rows=test_rows,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        lora_dropout=lora_dropout,
        target_fraction=target_fraction,
        seed=seed,
        seeds=seeds,
    )
    report = comparison.demo(config)
    console = Console()
    console.print(runs_table(report.runs, f"{report.model}, {report.total_steps} steps per run"), highlight=False)
    console.print(verdict(report.runs), highlight=False)
    if report.plans:
        console.print(plans_table(report.plans), highlight=False)
    console.print(f"report: {Path(output, 'report.html')}", highlight=False)


@app.command()
@clear_errors
def report(folder: Annotated[Path, typer.Argument(help="A folder with a report.json, or the file itself.")]) -> None:
    """Show a report's tables, and draw its picture and its page again."""
    from ..report.comparison import verdict
    from ..report.report import FreezeReport
    from ..report.tables import plans_table, runs_table

    path = folder if folder.suffix == ".json" else folder / "report.json"
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
    """Say what is installed, whether the extension loads, which kernels serve which device, and what to fix."""
    from .doctor import main as diagnose

    raise typer.Exit(diagnose())


def main() -> None:
    """Run the command line.

    Example:
        >>> main()  # doctest: +SKIP
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and a forking data loader do not go together
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that being ended cleans up as Ctrl-C does
    app()


if __name__ == "__main__":
    main()
