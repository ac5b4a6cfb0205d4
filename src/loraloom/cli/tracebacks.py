"""Where tracebacks go: to a file that its user alone can read, made when there is one to keep."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from typing_extensions import override

from loraloom.durable import cache_directory
from loraloom.errors import ConfigError


class TracebackFile(logging.Handler):
    """Keeps what loraloom logs as errors in a file, as long as the context lasts.

    `path` is None before the first error, and where no file can be written.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        self.path: Path | None = None

    def __enter__(self) -> TracebackFile:
        logging.getLogger("loraloom").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("loraloom").removeHandler(self)

    @override
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self.path = self.path or _new_file()
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.format(record) + "\n")


def _new_file() -> Path:
    """Make an empty file under a name that nobody can guess, in the user's cache if possible."""
    try:
        directory = cache_directory() / "tracebacks"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(".log", "loraloom-", directory)
    except (OSError, ConfigError):  # ConfigError: there is no home directory
        descriptor, name = tempfile.mkstemp(".log", "loraloom-")
    os.close(descriptor)
    return Path(name)
