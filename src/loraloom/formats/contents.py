"""What passes between the disk and the layouts: raw files, and the adapter understood from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.files import (
    CONFIG_FILE,
    LORA_FIELDS,
    AdapterFiles,
    AdapterRecord,
    BaseFields,
    checked_fields,
)
from loraloom.adapters.keys import TensorKey
from loraloom.adapters.method import AdapterConfig
from loraloom.config.data import PromptForm
from loraloom.errors import shown
from loraloom.formats.fields import read_settings
from loraloom.formats.own import own_settings

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
SIDECAR_WEIGHTS = "mixlora_model.safetensors"
SIDECAR_SETTINGS = ("config.yml", "config.yaml")
"""axolotl's files that are read beside these; the latter has the run's settings."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, SIDECAR_WEIGHTS, *SIDECAR_SETTINGS)
"""All that an adapter may be read from."""

RECORD_VERSION = 1
"""Version of what loraloom adds to the two layouts; files with a higher one are refused."""

_FILE_FIELDS = LORA_FIELDS | {"experts": "expert_lora"}


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter's files say of its base model, and of the prompts that it was trained on."""

    name_or_path: str | None = None
    model_type: str | None = None
    fingerprint: str | None = None
    num_parameters: int | None = None
    quantization: str | None = None
    prompt: PromptForm | None = None

    @classmethod
    def from_files(cls, files: AdapterFiles, record: Mapping[str, Any]) -> BaseRecord:
        """Read the record that loraloom added, {} where it added none."""
        read = checked_fields(AdapterRecord, record, f"{files.source}: `loraloom`")
        if read.version != RECORD_VERSION:
            raise files.error(
                f"written by a newer loraloom (version of the record must be {RECORD_VERSION}, "
                f"got {read.version}); upgrade loraloom"
            )
        return cls(
            name_or_path=files.config.get("base_model_name_or_path") or None,
            **read.base.model_dump(include=set(BaseFields.model_fields)),
            prompt=read.prompt,
        )

    def to_json(self) -> dict[str, Any]:
        """The record as it is stored; the name has a field of its own in both layouts."""
        fields = {
            "model_type": self.model_type,
            "fingerprint": self.fingerprint,
            "num_parameters": self.num_parameters,
        }
        if self.quantization is not None:
            fields["quantization"] = self.quantization
        record: dict[str, Any] = {"version": RECORD_VERSION, "base": fields}
        if self.prompt is not None:
            record["prompt"] = self.prompt.model_dump(exclude_none=True)
        return record


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its files describe it, before it meets a base model."""

    layout: str
    config: AdapterConfig
    """`target_modules` holds all names that the configuration lists or the tensors use."""
    tensors: dict[str, Tensor]
    """By our keys (keys.py)."""
    base: BaseRecord
    source: str
    layers_path: str | None = None
    """Path of the decoder layers in the base model, where the layout tells."""
    activation: str | None = None
    """The activation of the FFN, where the layout tells."""


def stored_adapter(
    files: AdapterFiles,
    method: type[AdapterConfig],
    layout: str,
    tensors: dict[str, Tensor],
    record: Mapping[str, Any],
    **known: Any,
) -> StoredAdapter:
    """Put an adapter together from what a layout has read."""
    keys = [key for key in map(TensorKey.parse, tensors) if key is not None]
    projections = [key.projection for key in keys if key.projection is not None]
    settings = read_settings(files, method, projections) | own_settings(files)
    config = _build_config(files, method, _with_given(settings, files.given))
    base = BaseRecord.from_files(files, record)
    return StoredAdapter(
        files.program or layout, config, {**tensors, **files.own}, base, files.source, **known
    )


def renamed(files: AdapterFiles, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Give tensors by our keys."""
    names = {key: name for name, key in keys.items()}
    for name, key in keys.items():
        if names[key] != name:
            raise files.error(f"tensors must differ, two are {key}: {names_in([name, names[key]])}")
    return {key: files.tensors[name] for name, key in keys.items()}


def common_fields(config: AdapterConfig, base: BaseInfo) -> dict[str, Any]:
    """Give the fields that adapter_config.json has in every layout."""
    return {
        "peft_type": config.peft_type,
        "base_model_name_or_path": base.name_or_path or None,
        "task_type": "CAUSAL_LM",
    }


def check_task(files: AdapterFiles) -> None:
    """Raise a FormatError if an adapter has a head or biases of its own."""
    if files.config.get("task_type") == "SEQ_CLS" or "classifier" in files.tensors:
        raise files.error("`task_type` must be CAUSAL_LM, got SEQ_CLS: it has a head of its own")
    if files.config.get("bias", "none") != "none":
        raise files.error(f"`bias` must be none, got {shown(files.config['bias'])}")


def _with_given(settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Put given settings in place of those in files, sections key by key."""
    merged = dict(settings)
    for name, value in given.items():
        own = merged.get(name)
        if isinstance(value, Mapping) and isinstance(own, dict):
            value = _with_given(own, value)
        merged[name] = value
    return merged


def _build_config(
    files: AdapterFiles, method: type[AdapterConfig], settings: dict[str, Any]
) -> AdapterConfig:
    try:
        return method(**settings)
    except ValidationError as error:
        faults = "; ".join(_fault(detail["loc"], detail["msg"]) for detail in error.errors())
        origin = f"{CONFIG_FILE} with the given settings" if files.given else CONFIG_FILE
        raise files.error(f"{origin} can't be used: {faults}") from error


def _fault(location: tuple[int | str, ...], message: str) -> str:
    path = ".".join(_FILE_FIELDS.get(str(name), str(name)) for name in location)
    return f"{path}: {message}" if path else message


def names_in(names: list[str], limit: int = 3) -> str:
    """Join the first few names, and count the rest."""
    first = ", ".join(name if len(name) <= 200 else f"{name[:200]} …" for name in names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"
