"""What passes between the disk and the layouts: raw files, and the adapter understood from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from torch import Tensor

from loraloom.config.adapter import LoraConfig
from loraloom.errors import FormatError
from loraloom.formats.keys import TensorKey

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"

RECORD_VERSION = 1
"""Version of what loraloom adds to the two layouts; files with a higher one are refused."""

Config = TypeVar("Config", bound=LoraConfig)

_FILE_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rank_stabilized": "use_rslora",
    "weight_decomposition": "use_dora",
    "experts": "expert_lora",
}


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter, before anything in them is understood."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """The header of the safetensors file."""
    source: str = "the adapter"
    """Where they came from, for messages."""

    def error(self, message: str) -> FormatError:
        """Make an error that names these files."""
        return FormatError(f"{self.source}: {message}")

    def required(self, name: str) -> Any:
        """Take a field that the configuration must have."""
        if name not in self.config:
            raise self.error(f"{CONFIG_FILE} must have the field `{name}`, it is missing")
        return self.config[name]

    def section(self, name: str) -> dict[str, Any]:
        """Take a field that holds fields, {} where it is missing or null."""
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(f"`{name}` in {CONFIG_FILE} must be an object, got {value!r}")
        return value


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter remembers of the base model that it was trained on."""

    name_or_path: str | None = None
    model_type: str | None = None
    fingerprint: str | None = None
    num_parameters: int | None = None

    @classmethod
    def from_files(cls, files: AdapterFiles, record: Mapping[str, Any]) -> BaseRecord:
        """Read the record that loraloom added, {} where it added none.

        Raises:
            FormatError: If a newer loraloom wrote it.
        """
        version = record.get("version", RECORD_VERSION)
        if version != RECORD_VERSION:
            raise files.error(
                f"written by a newer loraloom (version of the record must be {RECORD_VERSION}, "
                f"got {version}); upgrade loraloom"
            )
        base = record.get("base", {})
        return cls(
            name_or_path=files.config.get("base_model_name_or_path") or None,
            model_type=base.get("model_type"),
            fingerprint=base.get("fingerprint"),
            num_parameters=base.get("num_parameters"),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as it is stored; the name has a field of its own in both layouts."""
        return {
            "version": RECORD_VERSION,
            "base": {
                "model_type": self.model_type,
                "fingerprint": self.fingerprint,
                "num_parameters": self.num_parameters,
            },
        }


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its files describe it, before it meets a base model."""

    layout: Literal["peft", "moe-peft"]
    config: LoraConfig
    """`target_modules` holds all names that the configuration lists or the tensors use."""
    tensors: dict[str, Tensor]
    """By our keys (keys.py)."""
    base: BaseRecord
    source: str
    layers_path: str | None = None
    """Path of the decoder layers in the base model, where the layout tells."""
    activation: str | None = None
    """The activation of the FFN, where the layout tells."""


def lora_fields(files: AdapterFiles, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the fields that both layouts share, under loraloom's names.

    A name in `target_modules` that matches nothing has no effect in PEFT and MoE-PEFT; it is kept
    here and dropped when the adapter meets a base model without such a module.
    """
    used = [key.projection for key in map(TensorKey.parse, tensors) if key is not None]
    names = [*_listed_modules(files), *(name for name in used if name is not None)]
    return {
        "rank": files.required("r"),
        "alpha": files.required("lora_alpha"),
        "dropout": files.config.get("lora_dropout", 0.0),
        "target_modules": tuple(dict.fromkeys(names)),
        "rank_stabilized": files.config.get("use_rslora", False),
        "weight_decomposition": files.config.get("use_dora", False),
    }


def _listed_modules(files: AdapterFiles) -> list[str]:
    """Names in `target_modules`; a pattern (a string) is left to the tensors."""
    modules = files.config.get("target_modules")
    if isinstance(modules, dict):
        modules = [name for name, wanted in modules.items() if wanted]
    if not isinstance(modules, list):
        return []
    return [str(name).rpartition(".")[2] for name in modules]


def build_config(files: AdapterFiles, model: type[Config], fields: dict[str, Any]) -> Config:
    """Make the configuration, or say which of the file's fields are wrong."""
    try:
        return model(**fields)
    except ValidationError as error:
        faults = "; ".join(_fault(detail["loc"], detail["msg"]) for detail in error.errors())
        raise files.error(f"{CONFIG_FILE} can't be used: {faults}") from error


def _fault(location: tuple[int | str, ...], message: str) -> str:
    path = ".".join(_FILE_FIELDS.get(str(name), str(name)) for name in location)
    return f"{path}: {message}" if path else message


def names_in(names: list[str], limit: int = 3) -> str:
    """Join the first few names, and count the rest."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
