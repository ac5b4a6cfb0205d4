"""`loraloom`: the verbs, and what becomes of errors.

A verb is a function in the file of its name, which is imported when the verb is used, so that
`loraloom --help` is quick.
"""

import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

import pydantic
from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, ValidationError

import loraloom
from loraloom.config.fields import describe_faults
from loraloom.errors import LoraloomError, plain, shown

_HELP = "Train, evaluate and run mixtures of LoRA experts and plain adapters on one base model."
_CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree")

# Verb -> its function, as `file:name` of this package, and its line of --help.
VERBS: dict[str, tuple[str | Callable[..., None], str]] = {
    "quickstart": ("quickstart:quickstart", "Train eight adapters, and combine them into one."),
    "init": ("init:init", "Check a file of rows, and write a run file for it."),
    "train": ("train:train", "Train the adapters of a run file together."),
    "eval": ("eval:evaluate", "Score choice tasks, or held-out rows."),
    "report": ("report:report", "Write a run's results to one HTML page."),
    "generate": ("generate:generate", "Complete a prompt, or every prompt of a file."),
    "serve": ("serve:serve", "Serve the base model and its adapters with OpenAI's API."),
    "chat": ("chat:chat", "Chat with the base model and its adapters."),
    "combine": ("combine:combine", "Combine several trained adapters into one."),
    "inspect": ("adapter:inspect", "Show an adapter's method and sizes."),
    "export": ("export:export", "Write an adapter for transformers, vLLM or llama.cpp."),
    "convert": ("adapter:convert", "Convert an adapter's files for another program."),
    "config schema": ("config:schema", "Print the JSON Schema of run files."),
    "config show": ("config:show", "Check a run file and print all its settings."),
    "data show": ("data:show", "Check all rows, and print the first as tokens."),
}

# Verb with verbs of its own -> its help.
GROUPS = {"config": "Validate and inspect run files.", "data": "Check and inspect a run's data."}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own by default, and return the exit code.

    It is 0, 2 after a user's fault or one of the system (one message on stderr), 1 after any other
    (its traceback) and where nobody reads the output any more, 130 after Ctrl-C, 143 after SIGTERM
    and 129 after SIGHUP in training.
    """
    # transformers imports them, and they warn of kernels for devices that aren't there
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Python's own form has a line of code, which is none of the user's.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {plain(str(message))}\n"  # ty: ignore[invalid-assignment]
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _app(words)(words or ["--help"])
        sys.stdout.flush()  # now: Python would end with a traceback if that failed at its exit
        lacks_verb = not words or (len(words) == 1 and words[0] in GROUPS)
        return 2 if lacks_verb else 0
    except ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, pydantic.ValidationError):  # as those of a run file
            return _fail("\n".join(describe_faults(cause)))
        return _fail(str(error))
    except SystemExit as end:
        if isinstance(end.code, str):
            return _fail(end.code, 1)
        return end.code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CycloptsError, LoraloomError, OSError) as error:
        return _fail(str(error))
    except Exception as error:
        print(plain(traceback.format_exc()), file=sys.stderr)
        return _fail(f"unexpected {type(error).__name__}: {shown(str(error))}", 1)


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {plain(message)}", file=sys.stderr)
    return code


def _shown_default(value: object) -> str | None:
    if value is False or value in (None, (), []):
        return None
    return str(value)


def _mend_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in `~` in paths, as shells do where a word begins with it; keep texts as they stand."""
    for argument in arguments:
        hint = str(argument.hint)
        for index, token in enumerate(argument.tokens):
            if "Path" in hint:
                argument.tokens[index] = token.evolve(value=os.path.expanduser(token.value))
            elif argument.keys and "tuple" in hint:  # else read as JSON, if it is
                argument.tokens[index] = token.evolve(implicit_value=[token.value])


def _import(file: str) -> None:
    """Import a verb's file; no garbage collection passes over what stays, then or later."""
    # They took a third of a command's start, and 100 ms of a step now and then.
    if f"loraloom.cli.{file}" in sys.modules:
        return
    gc.disable()
    try:
        import_module(f"loraloom.cli.{file}")
    finally:
        gc.enable()
    gc.freeze()


def _app(words: Sequence[str]) -> App:
    # a flag has no --no-flag; of an option given twice the later counts
    parameter = Parameter(negative="", allow_repeating=True, show_default=_shown_default)
    app = App(
        "loraloom",
        help=_HELP,
        version=f"loraloom {loraloom.__version__}",
        version_flags=["--version"],
        config=_mend_values,
        default_parameter=parameter,
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    for name, text in GROUPS.items():
        app.command(App(name, help=text, version_flags=[]))
    app.register_install_completion_command()
    for verb, (command, summary) in VERBS.items():
        function = f"loraloom.cli.{command}" if isinstance(command, str) else command
        group, _, name = verb.rpartition(" ")
        above = app[group] if group else app
        if f"{' '.join(words)} ".startswith(f"{verb} "):
            if isinstance(command, str):
                _import(command.split(":")[0])
            above.command(function, name=name)
        else:
            above.command(function, name=name, help=summary)  # its file need not be imported
    return app
