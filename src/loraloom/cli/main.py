"""`loraloom`: the verbs, and what becomes of errors.

A verb is a function in the file of its name, which is imported when the verb is used, so that
`loraloom --help` is quick.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pydantic
from cyclopts import App, CycloptsError, Parameter, ValidationError

import loraloom
from loraloom.cli.tracebacks import TracebackFile
from loraloom.config.fields import describe_faults
from loraloom.errors import LoraloomError, plain, shown

_log = logging.getLogger(__name__)

_HELP = "Train, evaluate and run mixtures of LoRA experts and plain adapters on one base model."
_QUIET: Any = {"exit_on_error": False, "print_error": False, "result_action": "return_value"}
_CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""What warns when transformers imports it, of kernels for devices that aren't there."""

Command = Callable[..., None]

VERBS: dict[str, tuple[str | Command, str]] = {
    "quickstart": ("quickstart:quickstart", "Train two LoRAs and a mixture, and compare them."),
    "train": ("train:train", "Train the adapters of a run file together."),
    "eval": ("eval:evaluate", "Score choice questions, or held-out rows."),
    "report": ("report:report", "Put a run on one HTML page."),
    "generate": ("generate:generate", "Complete a prompt, or every prompt of a file."),
    "serve": ("serve:serve", "Serve the base model and its adapters with OpenAI's API."),
    "chat": ("chat:chat", "Talk to the base model and its adapters."),
    "inspect": ("inspect:inspect", "Show an adapter's method, sizes and norms."),
    "export": ("export:export", "Write an adapter for transformers, vLLM or llama.cpp."),
    "convert": ("convert:convert", "Write an adapter's files for another program."),
    "config schema": ("config:schema", "Print the JSON Schema of run files."),
    "config show": ("config:show", "Check a run file and print all its settings."),
    "data show": ("data:show", "Print the first rows of jobs as tokens."),
}
"""Verb -> its function, as `file:name` of this package, and its line of --help."""

GROUPS = {
    "config": "Run files: their schema, and one in full.",
    "data": "What a run's jobs learn from.",
}
"""Verb with verbs of its own -> its help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own by default, and return the exit code.

    It is 0, 2 after a user's fault (one message on stderr), 1 after any other (one line, which
    names the file that has the traceback) and where nobody reads the output any more, 130 after
    Ctrl-C, 143 after SIGTERM and 129 after SIGHUP in training.
    """
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    words = [*(sys.argv[1:] if argv is None else argv)]
    with TracebackFile() as tracebacks:
        try:
            return _run(words)
        except CycloptsError as error:
            _complain(_in_words(error), tracebacks)
            return 2
        except LoraloomError as error:
            _complain(str(error), tracebacks)
            return 2
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 1
        except Exception as error:
            _log.error("%s", shlex.join(["loraloom", *words]), exc_info=error)
            _complain(f"unexpected {type(error).__name__}: {shown(str(error))}", tracebacks)
            return 1
        finally:
            _flush_output()


def _run(words: list[str]) -> int:
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    _build_app(words)(words or ["--help"], **_QUIET)
    is_group = len(words) == 1 and words[0] in GROUPS
    return 2 if not words or is_group else 0


def _build_app(words: list[str]) -> App:
    """Declare the verbs; the help of the one that is used is its docstring."""
    app = _group("loraloom", _HELP, version=f"loraloom {loraloom.__version__}")
    groups = {name: _group(name, summary) for name, summary in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for verb, (command, summary) in VERBS.items():
        *above, name = verb.split()
        place = f"loraloom.cli.{command}" if isinstance(command, str) else command
        is_used = words[: len(above) + 1] == [*above, name]
        known = {} if is_used else {"help": summary}  # else its file is imported for it
        (groups[above[0]] if above else app).command(place, name=name, **known)
    return app


def _serve(words: list[str]) -> int:
    """Run the verb whose options are declared one by one."""
    import typer
    from typer.main import get_command

    command, _ = VERBS["serve"]
    if isinstance(command, str):
        from loraloom.cli.serve import serve as command
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    get_command(app).main(args=words, prog_name="loraloom serve")
    return 0


def _group(name: str, summary: str | None, version: str = "") -> App:
    flags = ["--version"] if version else []
    # A flag has no --no-flag; of an option given twice the later counts.
    parameter = Parameter(negative="", allow_repeating=True)
    return App(
        name, help=summary, version=version, version_flags=flags, default_parameter=parameter
    )


def _in_words(error: CycloptsError) -> str:
    """What is wrong with the options; a model's own messages are as those of a run file."""
    fault = error.__cause__
    if not isinstance(error, ValidationError) or not isinstance(fault, pydantic.ValidationError):
        return str(error)
    return "\n".join(describe_faults(fault))


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
