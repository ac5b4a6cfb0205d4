"""The pydantic model that every configuration is made of, and the choices that they share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError, model_validator

from loraloom.config.faults import advise_on_unknown_keys, raise_faults, value_fault
from loraloom.errors import ConfigError, shown

if TYPE_CHECKING:
    from pydantic import ValidationInfo as CheckInfo
else:  # pydantic's protocol can't be tested for at run time, as tests do
    CheckInfo = Any

Dtype = Literal["float32", "bfloat16", "float16"]
"""Number format of the base model's weights and of the low-rank products."""

BaseDtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
"""Number format of the base model's weights as it is asked for; auto: as the checkpoint has them,
but bfloat16 in place of float16 where the device computes in it."""

AttnImplementation = Literal["sdpa", "eager", "flash_attention_2"]
"""How transformers computes attention."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")


class StrictModel(BaseModel):
    """Frozen; unknown keys and infinities are refused; a field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest_key(cls, settings: Any, validate: Callable[[Any], Any]) -> Any:
        faults = [  # for Python, and so for pydantic, `true` is the number 1
            value_fault((name,), f"{name} must be a number, got {str(value).lower()}")
            for name, value in (settings.items() if isinstance(settings, dict) else ())
            if isinstance(value, bool) and name in cls.model_fields
            if _is_number(cls.model_fields[name].annotation)
        ]
        try:
            checked = validate(settings)
            if not faults:
                return checked
        except ValidationError as error:
            faults += advise_on_unknown_keys(error, cls)
        raise ValidationError.from_exception_data(cls.__name__, faults) from None

    @model_validator(mode="after")
    def _check_together(self) -> StrictModel:
        raise_faults(self.contradictions())
        return self

    def contradictions(self) -> Iterator[str]:
        """Say which settings don't go together, each of which is right by itself."""
        yield from ()


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers alone, or null."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = {*(get_args(annotation) if is_union else (annotation,))} - {NoneType}
    return bool(kinds) and kinds <= {int, float, ByteSize}


def check_device(device: str) -> str:
    """Return a device's name as it came."""
    if not _DEVICE.fullmatch(device):
        raise ConfigError(
            f"device must be auto, cpu, cuda, cuda:<index>, xpu, xpu:<index> or mps, got {device!r}"
        )
    return device


def check_name(name: str) -> str:
    """Return the name of a job or an adapter as it came. It becomes that of a directory."""
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
        raise ConfigError(
            "name must be a safe file name (1 to 100 letters, digits, '.', '_', '-' or '@', the "
            f"first a letter or digit), got {shown(name)}"
        )
    return name
