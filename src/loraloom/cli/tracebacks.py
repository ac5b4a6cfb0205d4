"""Where tracebacks go: to a file that its user alone can read, made when there is one to keep."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraloom.durable import cache_directory
from loraloom.errors import ConfigError


class TracebackFile(logging.Handler):
    """Appends the errors that are logged to a file of this process.

    Attributes:
        path: The file; None before the first error, and where no file can be written.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record with its traceback."""
        with suppress(OSError):
            self.path = self.path or _new_file()
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.format(record) + "\n")


@contextmanager
def kept_tracebacks() -> Iterator[TracebackFile]:
    """Keep what loraloom logs as errors in a file while the context lasts."""
    logger, handler = logging.getLogger("loraloom"), TracebackFile()
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


def _new_file() -> Path:
    """Make an empty file under a name that nobody can guess, in the user's cache if possible."""
    try:
        directory = cache_directory() / "tracebacks"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _private_file(directory)
    except (OSError, ConfigError):  # ConfigError: there is no home directory
        return _private_file(Path(tempfile.gettempdir()))


def _private_file(directory: Path) -> Path:
    descriptor, name = tempfile.mkstemp(".log", "loraloom-", directory)
    os.close(descriptor)
    return Path(name)
