"""Adapters' files as a server sees them: where they are, whether they changed, and their digest."""

import hashlib
import math
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import safetensors

from loraloom.config.fields import check_name
from loraloom.errors import ConfigError
from loraloom.formats.raw_files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    PICKLE_FILE,
    SIDECAR_WEIGHTS,
    WEIGHTS_FILE,
)

# What an adapter's files are like: names, sizes, times and inodes, of links those of their targets.
Files = frozenset[tuple[str, int, int, int]]

_DIGITS = 16
# Of a weight on the host, whatever the files have.
_WEIGHT_BYTES = 4


def files_of(source: str) -> Files | None:
    """Describe an adapter's files; None if there is no such directory."""
    if not source or not os.path.isdir(source):
        return None
    files = set()
    for name in ADAPTER_FILES:
        with suppress(OSError):  # loading says what is wrong with it
            status = os.stat(os.path.join(source, name))
            if stat.S_ISREG(status.st_mode):
                files.add((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return frozenset(files)


def has_config(files: Files | None) -> bool:
    return any(name == CONFIG_FILE for name, *_ in files or ())


def find_files(sources: Sequence[str], loaded_from: str) -> tuple[str, Files] | None:
    """Find the first directory that has an adapter, or had the one that is loaded."""
    for source in sources:
        files = files_of(source)
        # a writer takes adapter_config.json away for a moment
        if has_config(files) or (files is not None and source == loaded_from):
            return source, files or frozenset()
    return None


def names_below(directory: Path | None) -> list[str]:
    """Name the subdirectories that have adapters and that requests may name."""
    if directory is None or not directory.is_dir():
        return []
    names = sorted(path.name for path in directory.iterdir() if is_name(path.name))
    return [name for name in names if (directory / name / CONFIG_FILE).is_file()]


def is_name(name: str) -> bool:
    try:
        check_name(name)
    except ConfigError:
        return False
    return True


def digest_of(directory: Path) -> str:
    """Give the first digits of the SHA-256 of an adapter's files, one after the other."""
    digest = hashlib.sha256()
    paths = [directory / name for name in ADAPTER_FILES]
    for path in filter(Path.is_file, paths):  # no pipes
        with suppress(OSError), path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:_DIGITS]


def num_bytes_of(directory: Path) -> int:
    """Count the bytes that an adapter takes on the host, from its files' headers.

    What cannot be read counts nothing; loading reports what is wrong with it.
    """
    num_bytes = 0
    for name in (WEIGHTS_FILE, SIDECAR_WEIGHTS):
        with suppress(OSError, safetensors.SafetensorError):
            with safetensors.safe_open(directory / name, framework="pt") as file:
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
            num_bytes += _WEIGHT_BYTES * sum(map(math.prod, shapes))
    if not num_bytes:
        with suppress(OSError):
            num_bytes = (directory / PICKLE_FILE).stat().st_size
    return num_bytes
