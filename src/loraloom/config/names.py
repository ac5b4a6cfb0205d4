"""Names of jobs and adapters. They become names of directories, so they must be safe as such."""

from __future__ import annotations

import re

from loraloom.errors import ConfigError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")


def check_name(name: str) -> str:
    """Return the name as it came.

    Raises:
        ConfigError: If it could not be the name of a file everywhere.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise ConfigError(
            "name must be a safe file name (1 to 100 letters, digits, '.', '_', '-' or '@', the "
            f"first a letter or digit), got {name!r}"
        )
    return name
