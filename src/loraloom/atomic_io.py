"""Writing files so that a crash leaves the old or the new, and never a half.

What is written goes aside first, under a hidden name that nobody can guess or plant a link at, is
synced and renamed. Only a killed process leaves it there, ending with `.writing`.
"""

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError

_SUFFIX = ".writing"
_NUM_CHARACTERS = 16
_ASIDE = f".{_NUM_CHARACTERS * '?'}{_SUFFIX}"
# Errors where a directory can't replace a file, or a directory with files.
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def write_text(path: Path, text: str) -> None:
    """Write a file aside, sync it and put it in its place; of a link, its target stays."""

    def create(aside: Path) -> None:
        # A link that is there is an error. A file's name that is no UTF-8 comes as half surrogate
        # pairs: it must not cost the results.
        with aside.open("x", encoding="utf-8", errors="replace") as file:
            file.write(text)

    write_file(path, create)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let a function write a file aside, sync it and put it in its place; see `write_text`."""
    with _aside(path.parent) as aside:
        fill(aside)
        sync(aside)
        os.replace(aside, path)
    sync(path.parent)


def write_output(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from error


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a directory aside, sync it and put it in its place. Several processes may do so."""
    # An old one is renamed before and deleted last, so a kill in between leaves none: what can't be
    # made again, as checkpoints, goes to a new name.
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging(path.parent) as aside:
        fill(aside)
        for file in (*aside.rglob("*"), aside):
            sync(file)
        while aside.exists():
            with _aside(path.parent) as old:
                try:
                    with suppress(FileNotFoundError):
                        os.replace(path, old)
                    os.replace(aside, path)
                except BaseException as error:
                    if os.path.lexists(old) and not os.path.lexists(path):
                        os.replace(old, path)
                    if getattr(error, "errno", None) not in _OCCUPIED:  # by a faster writer
                        raise
    sync(path.parent)


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Make a directory in another one, for files on their way; it is gone afterwards."""
    with _aside(directory) as aside:
        aside.mkdir()
        yield aside


@contextmanager
def _aside(directory: Path) -> Iterator[Path]:
    """Name a path in a directory for what is on its way; what is there at the end goes."""
    aside = directory / f".{secrets.token_hex(_NUM_CHARACTERS // 2)}{_SUFFIX}"
    try:
        yield aside
    finally:
        with suppress(OSError):
            remove(aside)


def append_text(path: Path, text: str) -> None:
    """Append to a file, which is made when missing, and flush it to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
    sync(path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, which is made when missing, after the last that is whole."""
    cut_torn_line(path)  # which a full disk may have left
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def cut_torn_line(path: Path, max_bytes: int | None = None) -> None:
    """Cut a file of lines after the last that is whole, if there is a file."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        length = file.seek(0, os.SEEK_END)
        kept = length if max_bytes is None else min(length, max_bytes)
        while kept > file.seek(max(kept - 1, 0)) and file.read(1) != b"\n":
            kept -= 1
        file.truncate(kept)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Delete a directory at once: who reads it has all of it or none."""
    with _aside(path.parent) as aside, suppress(FileNotFoundError):
        os.replace(path, aside)


def remove_leftovers(directory: Path, older_than_s: float = 0.0) -> None:
    """Delete what killed writers left in a directory."""
    newest = time.time() - older_than_s
    for path in directory.glob(_ASIDE):
        with suppress(FileNotFoundError):
            if path.lstat().st_mtime <= newest:
                remove(path)


def is_being_written(directory: Path) -> bool:
    """Whether files are on their way to a directory, or a killed writer left some."""
    return any(directory.glob(_ASIDE))


def sync(path: Path) -> None:
    """Flush a file or, where the system can, a directory to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems sync no directories
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def prepare_output(path: Path | None, option: str) -> None:
    """Make the directory of a file that will be written, before the work that fills it."""
    if path is None:
        return
    if path.exists() and not path.is_file():  # root could replace /dev/null
        kind = "directory" if path.is_dir() else "device or pipe"
        raise ConfigError(f"{option} must be a file, got the {kind} {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"no permission to write to {path.parent}")
    except OSError as error:
        raise ConfigError(f"{option} can't be written to {path}: {error}") from error


def cache_directory() -> Path:
    """Name `$XDG_CACHE_HOME/loraloom`, which is in `~/.cache` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraloom"
