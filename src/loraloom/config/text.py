"""Text that comes from users and from files: YAML, JSON, paths, and `--set path=value`."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

from loraloom.errors import ConfigError, LoraloomError, shown


def parse_yaml(text: str, origin: str, error: type[LoraloomError] = ConfigError) -> Any:
    """The value of a document in YAML 1.2; None if it is empty."""
    yaml = YAML(typ="safe", pure=True)
    try:
        return yaml.load(text)
    except MarkedYAMLError as fault:
        mark = fault.problem_mark
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise error(f"{origin} must be valid YAML{position}: {fault.problem}") from None
    # ruamel lets Python's own errors through for a 13th month, or `!!bool maybe`
    except (YAMLError, ValueError, LookupError, RecursionError) as fault:
        raise error(f"{origin} must be valid YAML: {fault}") from None


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as run files are read, in YAML 1.2."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = sys.maxsize
    yaml.sort_base_mapping_type_on_output = False
    stream = StringIO()
    yaml.dump(settings, stream)
    return stream.getvalue()


def parse_json(text: str, origin: str, error: type[LoraloomError] = ConfigError) -> Any:
    """The value of a JSON text, without NaN and of at most 200 levels."""
    try:
        return from_json(text, allow_inf_nan=False)
    except (TypeError, ValueError) as fault:  # TypeError: half of a surrogate pair
        raise error(f"{origin} must be JSON: {fault}") from None


def read_json(path: Path, error: type[LoraloomError] = ConfigError) -> Any:
    return parse_json(read_text(path, error), str(path), error)


def read_text(path: Path, error: type[LoraloomError] = ConfigError) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as fault:
        raise error(f"{path} can't be read: {fault.strerror}") from None
    except UnicodeDecodeError as fault:
        raise error(f"{path} must be text in UTF-8: {fault}") from None


def local_path(text: str | Path, name: str, error: type[LoraloomError] = ConfigError) -> Path:
    """Expand `~`; raise an error if the system can't take it as a path. It need not exist."""
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise error(f"{name} must be a path, got {shown(str(text))}: {reason}") from None
    return path


def apply_override(settings: Any, override: str) -> Any:
    """A copy of nested settings with one of them changed, as by `--set path=value`."""
    path, equals, value = override.partition("=")
    path = path.strip()
    if not equals or not path.strip("."):
        raise ConfigError(
            f"--set must be path=value, like jobs.0.train.learning_rate=1e-4, got {shown(override)}"
        )
    parsed = parse_yaml(value, f"the value of --set {path}")
    return set_setting(settings, path.split("."), parsed, f"--set {path}")


def set_setting(node: Any, keys: Sequence[str], value: Any, origin: str) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node, list):
        if not node:
            raise ConfigError(f"{origin}: {shown(key)} must be in a list that has items")
        if not (key.isdecimal() and int(key) < len(node)):
            raise ConfigError(f"{origin}: {shown(key)} must be an index in [0, {len(node) - 1}]")
        items = list(node)
        items[int(key)] = set_setting(items[int(key)], rest, value, origin)
        return items
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise ConfigError(f"{origin}: {shown(node)} contains no settings to change")
    return {**node, key: set_setting(node.get(key), rest, value, origin)}


def read_settings(path: str | Path, kind: str) -> dict[str, Any]:
    """The settings in a file, not checked yet; `kind` is what messages call it, `a run file`."""
    settings = parse_yaml(read_text(local_path(path, kind)), str(path))
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else type(settings).__name__
        raise ConfigError(f"{path} must be a mapping of settings, got {got}")
    return settings
