"""Calls the command line."""

from __future__ import annotations

from typer.testing import CliRunner

from safe_peft.cli.main import app

WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner(env=WIDE).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr
