"""Who reaches a server, and with which keys."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from loraloom.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> list[str]:
    """Read API keys, one a line; empty lines and those that begin with # are left out."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file of API keys can't be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} must have an API key a line, it has none")
    return keys


def find_below(root: Path, text: str) -> str | None:
    """Find a directory below another one; None if there is none, or links lead out of it."""
    root = root.resolve()
    path = Path(os.path.normpath(root / text))
    try:
        if not path.is_relative_to(root) or not path.resolve().is_relative_to(root):
            return None
        files = [file.resolve() for file in path.iterdir()]
    except (OSError, RuntimeError, ValueError):  # a file, a circle of links, no path at all
        return None
    return str(path) if all(file.is_relative_to(root) for file in files) else None
