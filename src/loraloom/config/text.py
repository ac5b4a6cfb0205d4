"""Text that comes from users and from files: YAML, JSON, paths, and `--set path=value`."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

from loraloom.config.fields import describe_faults
from loraloom.errors import ConfigError, LoraloomError, shown

# Of a YAML document whose aliases are written out.
MAX_VALUES = 100_000

# Of a file that is read as a whole, unless its reader says less.
MAX_FILE_BYTES = 2**28

# Of a file of settings.
MAX_SETTINGS_BYTES = 1_000_000

_Config = TypeVar("_Config", bound=BaseModel)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a document in YAML 1.2; None if it is empty."""
    try:
        value = YAML(typ="safe", pure=True).load(text)
        _check_size(value)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{origin} must be valid YAML{place}: {error.problem}") from None
    # ruamel lets Python's own errors through for a 13th month, or `!!bool maybe`
    except (YAMLError, ValueError, LookupError) as error:
        raise ConfigError(f"{origin} must be valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin} must be YAML of a few levels, its are too deep") from None
    return value


def _check_size(value: Any) -> None:
    # a few lines of aliases can stand for billions of values, or for one inside of itself
    stack, budget = [value], MAX_VALUES
    while stack:
        node = stack.pop()
        budget -= 1
        if budget < 0:
            raise ValueError(f"there are more than {MAX_VALUES:,} values, aliases written out")
        if isinstance(node, str):
            node.encode()  # a UnicodeEncodeError, a ValueError, for half of a surrogate pair
        elif isinstance(node, dict):
            stack += [*node, *node.values()]
        elif isinstance(node, list | tuple):
            stack += node


def parse_json(
    text: str, origin: str, error: type[LoraloomError] = ConfigError, line: int = 1
) -> Any:
    """The value of a JSON text, without NaN and of at most 200 levels."""
    try:
        return from_json(text, allow_inf_nan=False)
    except TypeError:  # pydantic takes no text that could not be written as UTF-8
        raise error(f"{origin} must be JSON, line {line}: half a surrogate pair") from None
    except ValueError as fault:
        problem, _, place = str(fault).rpartition(" at line ")
        number, _, column = place.partition(" column ")
        problem = problem.replace("recursion limit exceeded", "more than 200 levels")
        where = f"line {line + int(number) - 1}, column {column}"
        raise error(f"{origin} must be JSON, {where}: {problem}") from None


def read_json(
    path: Path, error: type[LoraloomError] = ConfigError, max_bytes: int = MAX_FILE_BYTES
) -> Any:
    return parse_json(read_text(path, error, max_bytes), str(path), error)


def read_text(
    path: Path, error: type[LoraloomError] = ConfigError, max_bytes: int = MAX_FILE_BYTES
) -> str:
    """The text of a plain file in UTF-8, with or without a byte order mark."""
    try:
        # to open a pipe would wait for whoever writes to it
        if path.exists() and not path.is_file():
            raise error(f"{path} must be a file, it is something else")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise error(f"{path} must have at most {max_bytes:,} bytes, it has more")
        return data.decode("utf-8-sig")
    except OSError as fault:
        raise error(f"{path} can't be read: {fault.strerror}") from None
    except UnicodeDecodeError as fault:
        raise error(f"{path} must be text in UTF-8, byte {fault.start:,} is not") from None


def local_path(text: str | Path, name: str, error: type[LoraloomError] = ConfigError) -> Path:
    """A path with `~` filled in, that the system can be asked about without an exception."""
    path = Path(text)
    try:
        path = path.expanduser()
        path.stat()
    except (RuntimeError, ValueError) as fault:  # no such user; a null character
        raise error(f"{name} must be a path, got {shown(str(text))}: {fault}") from None
    except PermissionError:
        raise error(f"{name} {path}: no permission to look into its directory") from None
    except OSError as fault:
        if fault.errno == errno.ENAMETOOLONG:
            raise error(f"{name} must be a path, got {shown(str(text))}, a longer name") from None
    return path


def apply_override(settings: Any, override: str) -> Any:
    """A copy of nested settings with one of them changed, as by `--set path=value`."""
    path, equals, value = override.partition("=")
    path = path.strip()
    if not equals or not path.strip("."):
        raise ConfigError(
            f"--set must be path=value, like jobs.0.train.learning_rate=1e-4, got {shown(override)}"
        )
    return set_setting(settings, path, parse_yaml(value, f"the value of --set {path}"), "--set ")


def set_setting(settings: Any, path: str, value: Any, origin: str) -> Any:
    """A copy of nested settings with one of them changed; what shares a section is not."""
    if len(path) > 1000:
        raise ConfigError(f"{origin}{shown(path)} must have at most 1000 characters")
    return _replaced(settings, path.split("."), value, f"{origin}{path}")


def _replaced(node: Any, keys: Sequence[str], value: Any, origin: str) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node, list):
        if not (key.isdecimal() and len(key) < 9 and int(key) < len(node)):
            raise ConfigError(f"{origin}: {shown(key)} must be an index in [0, {len(node) - 1}]")
        index = int(key)
        return [*node[:index], _replaced(node[index], rest, value, origin), *node[index + 1 :]]
    if not isinstance(node, dict | None):
        raise ConfigError(f"{origin}: there is nothing to change inside {shown(node)}")
    mapping = node or {}
    return {**mapping, key: _replaced(mapping.get(key), rest, value, origin)}


def read_settings(path: str | Path, kind: str) -> dict[str, Any]:
    """The settings in a file, not checked yet; `kind` is what messages call it, `a run file`."""
    text = read_text(local_path(path, kind), max_bytes=MAX_SETTINGS_BYTES)
    settings = parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else type(settings).__name__
        raise ConfigError(f"{path} must be a mapping of settings, got {got}")
    return settings


def check_settings(
    path: str | Path,
    model: type[_Config],
    settings: Mapping[str, Any],
    other_names: Mapping[str, str] | None = None,
) -> _Config:
    """Settings as a model; all that is wrong with them is one ConfigError, which names the file."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        faults = describe_faults(error, settings, other_names)
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise ConfigError("\n  ".join([f"{path} has {count}:", *faults]))
