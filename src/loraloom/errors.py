"""What can go wrong, as one tree.

    LoraloomError           what a user can act on; the command line prints it, exits with 2
    ├── ConfigError         a run file, an option or a configuration of an adapter is wrong
    ├── DataError           a data set is missing, empty or has a row that can't be used
    ├── ModelError          a base model can't be loaded or attached to
    ├── AdapterError        an adapter is unknown, its name taken, or it does not fit the base
    ├── FormatError         files of an adapter can't be read
    └── TrainingError       a job can't continue (a loss that is not finite, say)

A message says what was expected, what came and what to do. It is short and plain text: what came
may be anybody's, so `shown` and `plain` leave no character that a terminal would obey.
"""

import reprlib
from collections.abc import Iterable, Sequence

MAX_MESSAGE = 4000  # characters; what is longer is cut

_shown = reprlib.Repr()
_shown.maxlevel = 3
_shown.maxlong = 80
_shown.maxother = 80
_shown.maxstring = 80


def shown(value: object) -> str:
    """Give a value that came from outside as a message shows it: short, and in quotes if a text."""
    return plain(_shown.repr(value))


def plain(text: str) -> str:
    """Escape characters that can't be printed (controls, lone surrogates), but not line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def names_in(names: Sequence[str], limit: int = 3) -> str:
    """Join the first few names, and count the rest."""
    text = ", ".join(names[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text


class LoraloomError(Exception):
    """Root of every error that loraloom raises on purpose."""

    def __init__(self, message: str = ""):
        text = plain(message[: MAX_MESSAGE + 1])  # which may be longer: an escape has up to ten
        if len(text) > MAX_MESSAGE:
            text = f"{text[: MAX_MESSAGE - 2]} …"
        super().__init__(text)


class ConfigError(LoraloomError, ValueError):
    """A run file, an option or an adapter's configuration is wrong."""


class DataError(LoraloomError, ValueError):
    """A data set is missing, empty or has a row that can't be used."""


class ModelError(LoraloomError):
    """A base model can't be loaded or attached to."""


class AdapterError(LoraloomError):
    """An adapter is unknown, its name is taken, or it doesn't fit the base model."""


class FormatError(LoraloomError):
    """Files of an adapter can't be read."""


class TrainingError(LoraloomError):
    """A job can't continue."""


def not_finite(
    name: str, value: object, adapters: Iterable[str | None], location: str = ""
) -> AdapterError:
    """Make the error of numbers that are not finite, of adapters or the base model (None)."""
    owners = ["the base model" if owner is None else f"adapter {owner!r}" for owner in adapters]
    source = f"{', '.join(owners)} {location}".rstrip()
    return AdapterError(
        f"{name} must be finite, got {value} from {source}; the "
        "weights have diverged, or exceed the range of float16 (use bfloat16)"
    )
