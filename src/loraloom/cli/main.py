"""`loraloom`: the verbs, and what becomes of errors.

A verb is a function in the file of its name. Those files import torch and transformers inside their
functions only, so that `loraloom --help` is quick.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated

import typer
from typer.main import get_command

import loraloom
from loraloom.cli import (
    chat,
    config,
    convert,
    data,
    eval,
    export,
    generate,
    inspect,
    quickstart,
    report,
    serve,
    train,
)
from loraloom.cli.tracebacks import TracebackFile, kept_tracebacks
from loraloom.errors import LoraloomError, plain, shown

_log = logging.getLogger(__name__)

_CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""What warns when transformers imports it, of kernels for devices that aren't there."""

Command = Callable[..., None]

VERBS: dict[str, Command] = {
    "quickstart": quickstart.quickstart,
    "train": train.train,
    "eval": eval.evaluate,
    "report": report.report,
    "generate": generate.generate,
    "serve": serve.serve,
    "chat": chat.chat,
    "inspect": inspect.inspect,
    "export": export.export,
    "convert": convert.convert,
}
"""Verb -> function, in the order of --help."""

GROUPS: dict[str, tuple[str, Mapping[str, Command]]] = {
    "config": ("Run files: their schema, and one in full.", config.SUBCOMMANDS),
    "data": ("What a run's jobs learn from.", data.SUBCOMMANDS),
}
"""Verb with verbs of its own -> its help, and the functions of those."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with kept_tracebacks() as tracebacks:
        try:
            get_command(_build_app()).main(args=argv, prog_name="loraloom")
        except LoraloomError as error:
            _complain(str(error), tracebacks)
            return 2
        except SystemExit as end:  # how typer ends, whatever the outcome
            return end.code if isinstance(end.code, int) else 0
        except Exception as error:
            _log.error("%s", shlex.join(sys.argv), exc_info=error)
            _complain(f"unexpected {type(error).__name__}: {shown(str(error))}", tracebacks)
            return 1
        finally:
            _flush_output()
    return 0


def _complain(message: str, tracebacks: TracebackFile) -> None:
    """Tell what went wrong on stderr, and where its traceback is if one was kept."""
    place = "" if tracebacks.path is None else f"; the traceback is in {tracebacks.path}"
    with suppress(OSError):
        print(f"error{_origin()}: {plain(message)}{place}", file=sys.stderr)


def _origin() -> str:
    """Say which of several ranks it is, as torchrun numbers them."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return "" if rank is None or size == "1" else f" on rank {plain(rank)}"


def _flush_output() -> None:
    """Write what is left to stdout now, as Python would end with a traceback if that failed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"warning: some of the output can't be written: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
