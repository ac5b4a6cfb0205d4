"""Who reaches a server, and with which keys."""

from __future__ import annotations

import ipaddress
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
