"""`loraloom`: the verbs, and what becomes of errors.

A verb is a function in the file of its name. Those files import torch and transformers inside their
functions only, so that `loraloom --help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer
from typer.main import get_command

import loraloom
from loraloom.cli import bench, config, eval, generate, inspect, quickstart, report, serve, train
from loraloom.errors import LoraloomError

Command = Callable[..., None]

VERBS: dict[str, Command] = {
    "quickstart": quickstart.quickstart,
    "train": train.train,
    "eval": eval.evaluate,
    "report": report.report,
    "generate": generate.generate,
    "serve": serve.serve,
    "inspect": inspect.inspect,
}
"""Verb -> function, in the order of --help."""

GROUPS: dict[str, tuple[str, Mapping[str, Command]]] = {
    "bench": ("What a layer, a training step and decoding cost.", bench.SUBCOMMANDS),
    "config": ("Run files: their schema, and one in full.", config.SUBCOMMANDS),
}
"""Verb with verbs of its own -> its help, and the functions of those."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: The words after `loraloom`; None takes the process's own.

    Returns:
        The exit code: 0, 2 after a user's fault (one message on stderr), 130 after Ctrl-C,
        143 after SIGTERM in training.
    """
    try:
        get_command(_build_app()).main(args=argv, prog_name="loraloom")
    except LoraloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # how typer ends, whatever the outcome
        return end.code if isinstance(end.code, int) else 0
    return 0


def _build_app() -> typer.Typer:
    app = _group(VERBS)
    app.callback()(_loraloom)
    for name, (summary, commands) in GROUPS.items():
        app.add_typer(_group(commands), name=name, help=summary)
    return app


def _group(commands: Mapping[str, Command]) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    for name, command in commands.items():
        group.command(name)(command)
    return group


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"loraloom {loraloom.__version__}")
        raise typer.Exit
    return wanted


def _loraloom(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train, evaluate and run mixtures of LoRA experts and plain adapters on one base model."""
