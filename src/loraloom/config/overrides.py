"""Settings changed from the command line: `--set jobs.0.train.learning_rate=1e-4`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.config.yaml_text import parse_yaml
from loraloom.errors import ConfigError, shown

MAX_DEPTH = 50
"""Keys of a path."""


def apply_override(settings: Any, override: str) -> Any:
    """A copy of nested settings with one of them changed."""
    path, equals, value = override.partition("=")
    if not equals or not path.strip(". "):
        raise ConfigError(
            f"--set must be path=value, like jobs.0.train.learning_rate=1e-4, got {shown(override)}"
        )
    path = path.strip()
    return set_setting(settings, path, parse_yaml(value, f"the value of --set {path}"), "--set ")


def set_setting(settings: Any, path: str, value: Any, origin: str) -> Any:
    """A copy of nested settings with one of them changed."""
    keys = path.split(".")
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"{origin}{shown(path)} must have at most {MAX_DEPTH} keys")
    return _replaced(settings, keys, 0, value, origin)


def _replaced(node: Any, keys: Sequence[str], depth: int, value: Any, origin: str) -> Any:
    if depth == len(keys):
        return value
    key = keys[depth]
    if isinstance(node, list):
        index = _index(node, keys, depth, origin)
        changed = _replaced(node[index], keys, depth + 1, value, origin)
        return [*node[:index], changed, *node[index + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise ConfigError(
            f"{origin}{'.'.join(keys)}: {'.'.join(keys[:depth])} must be a mapping or a list to be "
            f"changed inside, got {shown(node)}"
        )
    mapping = {} if node is None else node
    return {**mapping, key: _replaced(mapping.get(key), keys, depth + 1, value, origin)}


def _index(entries: list[Any], keys: Sequence[str], depth: int, origin: str) -> int:
    key = keys[depth]
    if not (key.isdecimal() and len(key) <= 9 and int(key) < len(entries)):
        raise ConfigError(
            f"{origin}{'.'.join(keys)}: after {'.'.join(keys[:depth])} must come an index in "
            f"[0, {len(entries) - 1}], got {shown(key)}"
        )
    return int(key)
