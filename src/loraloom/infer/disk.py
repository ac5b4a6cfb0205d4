"""Writing a result so that a crash leaves the old file or the new one."""

from __future__ import annotations

import os
from pathlib import Path

from loraloom.errors import ConfigError


def prepare_output(path: Path | None, option: str) -> None:
    """Make the directory of a file that will be written, before the work that fills it.

    Args:
        path: The file; None when none is wanted.
        option: What the user calls it, for messages.

    Raises:
        ConfigError: If no file can be written there.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} must be a file, got the directory {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} can't be written to {path}: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option} can't be written: no permission to write to {path.parent}")


def write_text(path: Path, text: str) -> None:
    """Write a file aside, sync it to the disk and put it in its place.

    Raises:
        ConfigError: If the system can't write there.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(f"{path} can't be written: {error}") from error
