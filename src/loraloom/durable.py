"""Writing files so that a crash leaves the old or the new, and never a half."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a file aside, sync it and put it in its place.

    Raises:
        OSError: If the system can't write there; nothing is left behind.
    """
    aside = _aside(path)
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a directory aside, sync it and put it in its place."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        fill(aside)
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or, where the system can, a directory to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_output(path: Path, text: str) -> None:
    """Write a result that the user asked for; see `write_text`.

    Raises:
        ConfigError: If the system can't write there.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")
