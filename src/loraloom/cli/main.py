"""`loraloom`: the verbs, and what becomes of errors.

A verb is a function in the file of its name, which is imported when the verb is used, so that
`loraloom --help` is quick.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

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
    "inspect": ("adapter:inspect", "Show an adapter's method, sizes and norms."),
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
    warnings.formatwarning = lambda message, *_, **__: f"warning: {plain(str(message))}\n"
    words = [*(sys.argv[1:] if argv is None else argv)]
    try:
        _app(words)(words or ["--help"])
        sys.stdout.flush()  # now: Python would end with a traceback if that failed at its exit
        return 0 if words and words not in [[group] for group in GROUPS] else 2
    except ValidationError as error:  # a model's own messages are as those of a run file
        cause = error.__cause__
        is_models = isinstance(cause, pydantic.ValidationError)
        return _fail("\n".join(describe_faults(cause)) if is_models else str(error))
    except SystemExit as end:
        return _fail(end.code, 1) if isinstance(end.code, str) else end.code or 0
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
    return None if value is False or value in (None, (), []) else str(value)


def _mend_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in `~` in paths, as shells do where a word begins with it; keep texts as they stand."""
    for argument in arguments:
        if "Path" in str(argument.hint):
            fill_in = os.path.expanduser
            argument.tokens[:] = [x.evolve(value=fill_in(x.value)) for x in argument.tokens]
        elif argument.keys and "tuple" in str(argument.hint):  # else read as JSON, if it is
            argument.tokens[:] = [x.evolve(implicit_value=[x.value]) for x in argument.tokens]


def _app(words: Sequence[str]) -> App:
    """Declare the verbs; the help of the one that is used is its docstring."""
    # A flag has no --no-flag; of an option given twice the later counts.
    parameter = Parameter(negative="", allow_repeating=True, show_default=_shown_default)
    options: Any = {"default_parameter": parameter, "exit_on_error": False, "print_error": False}
    options["result_action"] = "return_value"
    version: Any = {"version": f"loraloom {loraloom.__version__}", "version_flags": ["--version"]}
    app = App("loraloom", help=_HELP, config=_mend_values, **version, **options)
    for name, text in GROUPS.items():
        app.command(App(name, help=text, version_flags=[], **options))
    app.register_install_completion_command()
    for verb, (command, summary) in VERBS.items():
        *above, name = verb.split()
        function = f"loraloom.cli.{command}" if isinstance(command, str) else command
        is_used = words[: len(above) + 1] == [*above, name]
        help_text = {} if is_used else {"help": summary}  # else its file is imported for it
        group = app[above[0]] if above else app
        group.command(function, name=name, **help_text)
    return app
