"""The pydantic model that all settings are made of, and a clear line for each fault in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from loraloom.errors import ConfigError, LoraloomError, shown

_Model = TypeVar("_Model", bound=BaseModel)

# Names of peft and transformers that difflib would not find ours by.
_RENAMED = {
    "r": "rank",
    "use_dora": "weight_decomposition",
    "use_rslora": "rank_stabilized",
    "lr": "learning_rate",
    "per_device_train_batch_size": "micro_batch_size",
    "max_seq_length": "max_length",
    "model_name_or_path": "base_model",
}

# Unknown keys that an error names, and characters of each that are compared with known names.
_MAX_UNKNOWN = 20
_MAX_NAME = 100

# In place of pydantic's messages.
_MESSAGES = {
    "byte_size": 'must be a number, perhaps with a unit as in "20GB" or "512MiB", got {got}',
    "byte_size_unit": 'must have a unit as in "20GB" or "512MiB", got {got}',
    "missing": "is required, but missing",
    "union_tag_not_found": "requires {discriminator}, which is missing",
    "union_tag_invalid": "must have a {discriminator} of {expected_tags}, got {tag!r}",
}


class StrictModel(BaseModel):
    """Frozen; unknown keys and infinities are refused; a field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        names = cls.model_fields
        unknown = [*islice((key for key in settings if key not in names), _MAX_UNKNOWN)]
        if unknown:
            reasons = []
            for key in unknown:
                # difflib reads all of a name, however long it is
                advice = _instead(str(key)[:_MAX_NAME], names)
                reasons.append(f"unknown key {shown(key)}{advice}")
            raise _error_of(settings, reasons)
        return settings

    @model_validator(mode="after")
    def _check_together(self) -> StrictModel:
        if reasons := [*self.contradictions()]:
            raise _error_of(self, reasons)
        return self

    def contradictions(self) -> Iterator[str]:
        """Find settings that are valid alone, but contradict one another."""
        yield from ()


def _instead(key: str, names: Iterable[str]) -> str:
    ours = _RENAMED.get(key)
    if ours and ours in names:
        return f"; did you mean {ours!r}?"
    return did_you_mean(key, names) or f"; known keys are {', '.join(sorted(names))}"


def _error_of(settings: Any, reasons: Sequence[str]) -> ValidationError:
    faults: list[InitErrorDetails] = [
        {"type": PydanticCustomError("settings", "{text}", {"text": reason}), "input": settings}
        for reason in reasons
    ]
    return ValidationError.from_exception_data("", faults)


def checked(
    model: type[_Model],
    settings: Any,
    error: type[LoraloomError] = ConfigError,
    origin: str = "",
    other_names: Mapping[str, str] | None = None,
) -> _Model:
    """Settings as a model; all that is wrong with them is one error."""
    try:
        return model.model_validate(settings)
    except ValidationError as fault:
        raise error(origin + "\n  ".join(describe_faults(fault, settings, other_names))) from None


def describe_faults(
    error: ValidationError, settings: Any = None, other_names: Mapping[str, str] | None = None
) -> list[str]:
    """A line for each fault: `<path> must be ..., got ...`, or write this in place of that name."""
    lines = []
    for fault in error.errors():
        kind = fault["type"]
        path = _path_in_file(fault["loc"], settings, is_missing=kind == "missing")
        if kind in ("settings", "value_error"):  # our own
            message = fault["msg"].removeprefix("Value error, ")
            if path and re.match(rf"{re.escape(path[-1])}\b", message):  # not of a section
                path.pop()
            lines.append(f"{'.'.join(path)}: {message}".removeprefix(": "))
        elif kind != "default_factory_not_called":  # which follows from another one
            message = _describe_value(fault, other_names or {})
            lines.append(f"{'.'.join(path)} {message}".lstrip())
    return lines


def _describe_value(fault: ErrorDetails, other_names: Mapping[str, str]) -> str:
    context = fault.get("ctx", {})
    message = re.sub(r"^\w+ should", "must", fault["msg"]).replace("tuple", "list")
    message = re.sub("valid dictionary.*", "mapping", message)
    template = _MESSAGES.get(fault["type"], "{}, got {got}")
    message = template.format(message, got=shown(fault["input"]), **context)
    value = str(context.get("tag", fault["input"]))
    other_name = other_names.get(value.lower())
    if other_name:
        return f"{message}; write {other_name}"
    allowed = context.get("expected_tags", context.get("expected", ""))
    names = re.findall("'([^']*)'", allowed)
    return f"{message}{did_you_mean(value, names)}"


def _path_in_file(loc: Sequence[int | str], settings: Any, *, is_missing: bool) -> list[str]:
    """A place that pydantic reported, without the tags of unions, which settings don't have."""
    if settings is None:  # they are not known
        return [str(step) for step in loc]
    path = []
    for step in loc[:-1] if is_missing else loc:
        with suppress(LookupError, TypeError):
            settings = settings[step]
            path.append(str(step))
    return [*path, str(loc[-1])] if is_missing else path


def suggestion(name: str, names: Iterable[str]) -> str:
    """The question `did you mean 'x'? ` for the nearest known name; nothing if none is near."""
    nearest = get_close_matches(name, list(names), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    return f"; {suggestion(name.lower(), names)}".rstrip("; ")


def check_name(name: str) -> str:
    """Return the name of a job or an adapter as it came. It becomes that of a directory."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}", name):
        raise ConfigError(
            "name must be a safe file name (1 to 100 letters, digits, '.', '_', '-' or '@', the "
            f"first a letter or digit), got {shown(name)}"
        )
    return name
