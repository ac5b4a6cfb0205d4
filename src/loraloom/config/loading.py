"""Reading of files of settings, with all the faults of a file in one message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from loraloom.config.faults import describe_faults
from loraloom.config.paths import local_path
from loraloom.config.task import TaskConfig
from loraloom.config.yaml_text import parse_yaml
from loraloom.errors import ConfigError

MAX_BYTES = 1_000_000
"""Of a file of settings."""

_Config = TypeVar("_Config", bound=BaseModel)


def load_task_config(path: str | Path) -> TaskConfig:
    """What the file of a choice task says, checked."""
    return check_settings(path, TaskConfig, read_settings(path, "a task's file"))


def read_settings(path: str | Path, kind: str) -> dict[str, Any]:
    """The settings in a file, not checked yet."""
    settings = parse_yaml(_read_text(Path(path), kind), str(path))
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else type(settings).__name__
        raise ConfigError(f"{path} must be a mapping of settings, got {got}")
    return settings


def _read_text(path: Path, kind: str) -> str:
    path = local_path(path, kind)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} must be {kind}, but there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} must be {kind} of at most {MAX_BYTES:,} bytes, it is larger")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} must be a YAML file, but it is not text in UTF-8") from None


def check_settings(
    path: str | Path,
    model: type[_Config],
    settings: Mapping[str, Any],
    context: Mapping[str, Any] | None = None,
) -> _Config:
    """Settings as a model; all that is wrong with them is one ConfigError, which names the file."""
    try:
        return model.model_validate(settings, context=context)
    except ValidationError as error:
        faults = describe_faults(error, (model,))
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise ConfigError("\n".join([f"{path} has {count}:", *(f"  {fault}" for fault in faults)]))
