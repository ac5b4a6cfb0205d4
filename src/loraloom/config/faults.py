"""What is wrong with a configuration, a line for each fault, in the words of the file.

pydantic names places like `jobs.0.adapter.mixlora.rank`; here a place is what `--set` takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from loraloom.errors import ConfigError, shown

MAX_FAULTS = 30
"""Of one message."""

Models = tuple[type[BaseModel], ...]
_Model = TypeVar("_Model", bound=BaseModel)

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "byte_size": 'a number of bytes, or a text like "20GB"',
    "byte_size_unit": 'a number of bytes, or a text like "20GB"',
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "path_type": "a path",
    "string_too_short": "a text that is not empty",
    "string_type": "a text (in quotes)",
    "string_unicode": "a text without halves of surrogate pairs",
    "too_short": "a list of {min_length} or more",
    "tuple_type": "a list",
}
"""What each of pydantic's error types expects."""

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
"""Names of peft and transformers that difflib would not find ours by."""

_TAGS = ("method", "name", "quant_method")
"""Fields that tell the members of a union apart."""


def describe_faults(error: ValidationError, models: Models) -> list[str]:
    """A line for each fault: `<path> must be ..., got ...`."""
    details = [details for details in error.errors() if not _follows(details)]
    faults = [_describe(one, models) for one in details[:MAX_FAULTS]]
    more = len(details) - len(faults)
    return [*faults, f"and {more} more faults"] if more else faults


def checked(model: type[_Model], settings: Any) -> _Model:
    """Settings as a model; all that is wrong with them is one ConfigError."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(describe_faults(error, (model,)))) from error


def value_fault(loc: tuple[int | str, ...], reason: str) -> InitErrorDetails:
    """A fault that a check of ours found, for `ValidationError.from_exception_data`."""
    return {
        "type": "value_error",
        "loc": loc,
        "input": None,
        "ctx": {"error": ValueError(reason)},
    }


def raise_faults(faults: Iterable[str]) -> None:
    """Raise faults, if there are any, in a way that gives each a line."""
    if faults := list(faults):
        raise ValidationError.from_exception_data("", [value_fault((), one) for one in faults])


def advise_on_unknown_keys(
    error: ValidationError, model: type[BaseModel]
) -> list[InitErrorDetails]:
    """An error's faults, with the nearest known key for each that the model itself doesn't know."""
    known = _known_keys((model,))
    return [
        _unknown_key(details, known)
        if details["type"] == "extra_forbidden" and len(details["loc"]) == 1
        else as_fault(details)
        for details in error.errors()
    ]


def _unknown_key(details: ErrorDetails, known: list[str]) -> InitErrorDetails:
    key = str(details["loc"][0])
    fault = PydanticCustomError(
        "unknown_key",
        "unknown key {key}; {advice}",
        {"key": shown(key), "advice": _advice(key, known)},
    )
    return {"type": fault, "loc": details["loc"], "input": details["input"]}


def as_fault(details: ErrorDetails) -> InitErrorDetails:
    """A fault that pydantic reported, for `ValidationError.from_exception_data`."""
    kind: Any = details["type"]
    message: Any = details["msg"]
    if kind not in get_args(ErrorType):  # one that is not built into pydantic
        kind = PydanticCustomError(kind, message, _context(details))
    place, given = details["loc"], details["input"]
    return {"type": kind, "loc": place, "input": given, "ctx": _context(details)}


def describe_unknown_setting(path: str, models: Models) -> str | None:
    """What is wrong with a path that `--set` would take; None if a setting may be there."""
    section: list[int | str] = []
    chain = [models]
    for key in path.split("."):
        if not models:  # a plain value, or a mapping of anything
            return None
        if not key.isdecimal():
            if key not in _known_keys(models):
                where = f"{'.'.join(map(str, section))} has" if section else "there is"
                known = _known_keys(models)
                home = _home_of([*section, key], [*chain, ()])
                return f"{where} no setting {shown(key)}; {home or _advice(key, known)}"
            models = _models_under(models, key)
        section.append(key)
        chain.append(models)
    return None


def _joined(path: Iterable[int | str]) -> str:
    """A path in the words of `--set`; keys may be anybody's, and are shortened."""
    return ".".join(text if len(text) <= 80 else f"{text[:80]}…" for text in map(str, path))


def _follows(details: ErrorDetails) -> bool:
    """Whether a fault only follows from another one, which is reported too."""
    if details["type"] == "too_short":  # pydantic counts the entries that are right
        return len(details["input"]) >= _context(details)["min_length"]
    return details["type"] == "default_factory_not_called"


def _context(details: ErrorDetails) -> dict[str, Any]:
    return details.get("ctx", {})


def _describe(details: ErrorDetails, root: Models) -> str:
    path, models = _locate(details["loc"], root)
    place = _joined(path)
    match details["type"]:
        case "value_error":
            return _in_place(details, path, models)
        case "missing":
            return f"{place} must be given, it is missing"
        case "unknown_key":
            home = None if " belongs to " in details["msg"] else _home_of(path, models)
            key = shown(str(path[-1]))
            told = details["msg"] if home is None else f"unknown key {key}; {home}"
            return f"{_joined(path[:-1])}: {told}".removeprefix(": ")
        case "union_tag_invalid" | "union_tag_not_found":
            return _describe_tag(place, models[-1], details)
    if details["type"] not in _EXPECTED:
        return f"{place}: {details['msg']}, got {shown(details['input'])}"
    expected = _EXPECTED[details["type"]].format(**_context(details))
    hint = _nearest_choice(details) if details["type"] == "literal_error" else ""
    return f"{place} must be {expected}, got {_shown(details['input'])}{hint}".removeprefix(" ")


def _locate(loc: Sequence[int | str], root: Models) -> tuple[list[int | str], list[Models]]:
    """The path that the file knows, and the models that may stand after each of its steps."""
    path: list[int | str] = []
    models = [root]
    for step in loc:
        chosen = tuple(model for model in models[-1] if _tag(model) == step)
        if chosen and len(models[-1]) > 1:  # the tag of a union, which is no step in the file
            models[-1] = chosen
            continue
        path.append(step)
        models.append(models[-1] if isinstance(step, int) else _models_under(models[-1], step))
    return path, models


def _home_of(path: Sequence[int | str], models: Sequence[Models]) -> str | None:
    """Where a key belongs that its section doesn't know: in a section of this one or beside it."""
    key = _RENAMED.get(str(path[-1]), str(path[-1]))
    if len(models) < 2 or key in _known_keys(models[-2]):
        return None
    for place in range(len(path) - 1, -1, -1):
        for name in _known_keys(models[place]):
            if name not in path and key in _known_keys(_models_under(models[place], name)):
                return f"{key} belongs to `{name}`"
        if place < len(path) - 1 and key in _known_keys(models[place]):
            return f"{key} belongs beside `{path[place]}`, not into it"
    return None


def _tag(model: type[BaseModel]) -> str | None:
    """What a section is recognised by: the method of an adapter, the name of an objective."""
    defaults = [model.model_fields[name].default for name in _TAGS if name in model.model_fields]
    return next((default for default in defaults if isinstance(default, str)), None)


def _models_under(models: Models, field: str) -> Models:
    annotations = [m.model_fields[field].annotation for m in models if field in m.model_fields]
    return tuple(model for annotation in annotations for model in _models_in(annotation))


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _known_keys(models: Models) -> list[str]:
    return sorted({name for model in models for name in model.model_fields})


def _in_place(details: ErrorDetails, path: list[int | str], models: list[Models]) -> str:
    """A check's own message, which begins with a setting, after the path of its section."""
    message = str(_context(details).get("error", details["msg"]))
    setting = message.partition(" ")[0].partition(".")[0]
    if setting in _known_keys(models[-1]):
        return ".".join([*map(str, path), message])
    if len(models) > 1 and setting in _known_keys(models[-2]):
        return ".".join([*map(str, path[:-1]), message])
    return f"{_joined(path)}: {message}".removeprefix(": ")


def _advice(key: str, known: list[str]) -> str:
    if key in ("weight", "expert_group") and "mix" in known:
        return f"{key} belongs to a source inside mix"
    if _RENAMED.get(key) in known:
        return f"did you mean {_RENAMED[key]!r}?"
    return suggestion(key, known).rstrip() or f"known keys are {', '.join(known)}"


def _describe_tag(place: str, models: Models, details: ErrorDetails) -> str:
    tags = [str(_tag(model)) for model in models]
    setting = f"{place}.{_tag_field(models)}".removeprefix(".")
    expected = f"one of {', '.join(tags)}"
    if details["type"] == "union_tag_not_found":
        return f"{setting} must be {expected}, it is missing"
    given = str(_context(details)["tag"])
    aliases = {name: text for model in models for name, text in _aliases(model).items()}
    if given.lower() in aliases:
        hint = f"; write {aliases[given.lower()]}"
    else:
        hint = did_you_mean(given, tags)
    return f"{setting} must be {expected}, got {shown(given)}{hint}"


def _aliases(model: type[BaseModel]) -> Mapping[str, str]:
    """Other names for a section of this kind, and what to write instead."""
    return vars(model).get("aliases", {})


def _tag_field(models: Models) -> str:
    return next(name for name in _TAGS if all(name in model.model_fields for model in models))


def _nearest_choice(details: ErrorDetails) -> str:
    choices = re.findall(r"'([^']*)'", _context(details)["expected"])
    return did_you_mean(str(details["input"]), choices)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The question `did you mean 'x'? ` for the nearest known name; nothing if none is near."""
    nearest = get_close_matches(name, list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question of `suggestion`, to be put behind a message."""
    return f"; {suggestion(name.lower(), known)}".rstrip("; ")


def _shown(value: Any) -> str:
    """A value short enough for a line, in the words of YAML where Python's differ."""
    words = {None: "nothing", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return shown(value)
