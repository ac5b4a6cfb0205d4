"""Paths as users give them, on the command line and in run files."""

from __future__ import annotations

import os
from pathlib import Path

from loraloom.errors import ConfigError, LoraloomError, shown

_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4095, 255
"""What Linux takes; other systems take about as much."""


def local_path(text: str | Path, name: str, error: type[LoraloomError] = ConfigError) -> Path:
    """A path with `~` filled in, that the system can be asked about without an exception."""
    if "\0" in str(text):
        raise error(f"{name} must be a path, got {shown(str(text))} with a null character")
    try:
        path = Path(text).expanduser()
        size = len(os.fsencode(path))
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except RuntimeError:  # what pathlib raises where it knows no home
        raise error(f"{name} must be a path, got {shown(str(text))}: no such user here") from None
    except UnicodeEncodeError:
        raise error(f"{name} must be a path, got {shown(str(text))}, which no file has") from None
    if size > _MAX_PATH_BYTES or longest > _MAX_NAME_BYTES:
        raise error(
            f"{name} must be a path of names of at most {_MAX_NAME_BYTES} bytes, together "
            f"{_MAX_PATH_BYTES}, got {longest} and {size} in {shown(str(text))}"
        )
    try:
        path.exists()
    except PermissionError:
        raise error(f"{name} {path}: no permission to look into its directory") from None
    except OSError:  # of the device: who reads it says so, or tries again
        pass
    return path
