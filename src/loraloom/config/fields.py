"""The pydantic model that all settings are made of, and a clear line for each fault in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from loraloom.errors import ConfigError, LoraloomError, shown

if TYPE_CHECKING:
    from pydantic import ValidationInfo as CheckInfo
else:  # pydantic's protocol can't be tested for at run time, as tests do
    CheckInfo = Any

# Of one message.
MAX_FAULTS = 30

_Model = TypeVar("_Model", bound=BaseModel)

# Names of peft and transformers that difflib would not find ours by.
_RENAMED = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_dora": "weight_decomposition",
    "use_rslora": "rank_stabilized",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "lr_scheduler_kwargs": "lr_scheduler_args",
    "optim": "optimizer",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "max_seq_length": "max_length",
    "model_name_or_path": "base_model",
    "torch_dtype": "dtype",
}

# pydantic's words, and those of run files.
_WORDS = {
    "Input should be": "must be",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text (in quotes)",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "a mapping",
    "Field required": "must be given, it is missing",
}


class StrictModel(BaseModel):
    """Frozen; unknown keys and infinities are refused; a field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest_key(cls, settings: Any, validate: Callable[[Any], Any]) -> Any:
        # only here is it known which model lacks the key
        try:
            return validate(settings)
        except ValidationError as error:
            faults = [
                _unknown_key(fault, list(cls.model_fields))
                if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1
                else _as_fault(fault, cls)
                for fault in error.errors()
            ]
        raise ValidationError.from_exception_data(cls.__name__, faults)

    @model_validator(mode="after")
    def _check_together(self) -> StrictModel:
        raise_faults(self.contradictions())
        return self

    def contradictions(self) -> Iterator[str]:
        """Say which settings don't go together, each of which is right by itself."""
        yield from ()


def _unknown_key(fault: ErrorDetails, known: list[str]) -> InitErrorDetails:
    key = str(fault["loc"][0])
    ours = _RENAMED.get(key)
    advice = f"did you mean {ours!r}?" if ours in known else suggestion(key, known).rstrip()
    text = f"unknown key {shown(key)}; {advice or 'known keys are ' + ', '.join(sorted(known))}"
    kind = PydanticCustomError("unknown_key", "{text}", {"text": text})
    return {"type": kind, "loc": fault["loc"], "input": fault["input"]}


def _as_fault(fault: ErrorDetails, model: type[BaseModel]) -> InitErrorDetails:
    """A fault that pydantic reported, for `ValidationError.from_exception_data`."""
    kind: Any = fault["type"]
    context = fault.get("ctx", {})
    if kind == "unknown_key" and (home := _home_of(fault["loc"], model)):
        text = f"unknown key {shown(str(fault['loc'][-1]))}; {home}"
        kind = PydanticCustomError("unknown_key", "{text}", {"text": text})
    elif kind not in get_args(ErrorType):  # not built into pydantic
        message: Any = fault["msg"]
        kind = PydanticCustomError(kind, message, context)
    return {"type": kind, "loc": fault["loc"], "input": fault["input"], "ctx": context}


def _home_of(loc: Sequence[int | str], model: type[BaseModel]) -> str:
    """Where a key belongs that a section of a model doesn't know; nothing if nobody knows it."""
    section, key = str(loc[0]), _RENAMED.get(str(loc[-1]), str(loc[-1]))
    fields = model.model_fields
    homes = [name for name, field in fields.items() if key in _known_keys(field.annotation)]
    if section in homes:  # by another name
        return ""
    if key in fields:
        return f"{key} belongs next to {section!r}, not into it"
    return f"{key} belongs to {homes[0]!r}" if homes else ""


def _known_keys(annotation: Any) -> Iterator[str]:
    """The keys of all models that a setting may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from annotation.model_fields
    for argument in get_args(annotation):
        yield from _known_keys(argument)


def raise_faults(reasons: Iterable[str]) -> None:
    """Raise faults, if there are any, in a way that gives each a line."""
    faults: list[InitErrorDetails] = [
        {"type": "value_error", "loc": (), "input": None, "ctx": {"error": ValueError(reason)}}
        for reason in reasons
    ]
    if faults:
        raise ValidationError.from_exception_data("", faults)


def checked(
    model: type[_Model],
    settings: Any,
    error: type[LoraloomError] = ConfigError,
    origin: str = "",
) -> _Model:
    """Settings as a model; all that is wrong with them is one error."""
    try:
        return model.model_validate(settings)
    except ValidationError as fault:
        raise error(origin + "\n".join(describe_faults(fault, settings))) from None


def describe_faults(
    error: ValidationError, settings: Any = None, other_names: Mapping[str, str] | None = None
) -> list[str]:
    """A line for each fault: `<path> must be ..., got ...`.

    Args:
        error: The faults.
        settings: What was checked.
        other_names: What to write in place of names that nothing here goes by.
    """
    details = [fault for fault in error.errors() if not _follows(fault)]
    lines = [_describe(fault, settings, other_names or {}) for fault in details[:MAX_FAULTS]]
    more = len(details) - len(lines)
    return [*lines, f"and {more} more faults"] if more else lines


def _follows(fault: ErrorDetails) -> bool:
    # pydantic counts the entries of a list that are right: one that is wrong makes it too short
    if fault["type"] == "too_short":
        return len(fault["input"]) >= fault.get("ctx", {})["min_length"]
    return fault["type"] == "default_factory_not_called"


def _describe(fault: ErrorDetails, settings: Any, other_names: Mapping[str, str]) -> str:
    path, section = _path_in_file(fault["loc"], settings)
    context, kind, message = fault.get("ctx", {}), fault["type"], fault["msg"]
    match kind:
        case "value_error":
            message = str(context["error"])
            setting = re.split(r"[ .]", message)[0]
            if path and path[-1] == setting:  # a check of a field, not of a section
                return ".".join([*path[:-1], message])
            if isinstance(section, dict) and setting in section:
                return ".".join([*path, message])
            return f"{'.'.join(path)}: {message}".removeprefix(": ")
        case "unknown_key":
            return f"{'.'.join(path[:-1])}: {message}".removeprefix(": ")
        case "union_tag_invalid" | "union_tag_not_found":
            path = [*path, context["discriminator"].strip("'")]
            message = "must be given, it is missing"
            if kind == "union_tag_invalid":
                tag, known = context["tag"], re.findall(r"'([^']*)'", context["expected_tags"])
                message = f"must be one of {', '.join(known)}, got {shown(tag)}"
                other = other_names.get(tag.lower())
                message += f"; write {other}" if other else did_you_mean(tag, known)
            return f"{'.'.join(path)} {message}"
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    message = re.sub(", (unable to|got a number).*", "", message)
    if kind in ("model_type", "model_attributes_type"):
        message = "must be a mapping"
    if kind != "missing":
        value = fault["input"]
        text = str(value).lower() if isinstance(value, bool) else shown(value)
        message += f", got {'nothing' if value is None else text}"
    if kind == "literal_error":
        message += did_you_mean(str(fault["input"]), re.findall(r"'([^']*)'", context["expected"]))
    return f"{'.'.join(path)} {message}".lstrip()


def _path_in_file(loc: Sequence[int | str], settings: Any) -> tuple[list[str], Any]:
    """A place that pydantic reported, without the tags of unions, and what the file has there."""
    path = []
    for place, step in enumerate(loc):
        if isinstance(settings, dict) and isinstance(step, str) and step not in settings:
            is_last = place == len(loc) - 1
            if not is_last or step in settings.values():  # a tag: {method: lora} has no key lora
                continue
        text = str(step)
        path.append(text if len(text) <= 80 else f"{text[:80]}…")
        if isinstance(settings, dict):
            settings = settings.get(step)
        elif isinstance(settings, list | tuple) and isinstance(step, int):
            settings = settings[step] if step < len(settings) else None
        else:
            settings = None
    return path, settings


def suggestion(name: str, known: Iterable[str]) -> str:
    """The question `did you mean 'x'? ` for the nearest known name; nothing if none is near."""
    nearest = get_close_matches(name, list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question of `suggestion`, to be put behind a message."""
    return f"; {suggestion(name.lower(), known)}".rstrip("; ")


def check_name(name: str) -> str:
    """Return the name of a job or an adapter as it came. It becomes that of a directory."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}", name):
        raise ConfigError(
            "name must be a safe file name (1 to 100 letters, digits, '.', '_', '-' or '@', the "
            f"first a letter or digit), got {shown(name)}"
        )
    return name
