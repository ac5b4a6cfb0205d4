"""Adapters in a layout of our own, for methods that no other library stores.

    base_model.model.layers.{L}.{block}.{projection}.{part}      and all other names of keys.py

adapter_config.json holds the method's settings under their own names, and under `"loraloom"` what
is known of the base model.
"""

from __future__ import annotations

from torch import Tensor

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.method import AdapterConfig
from loraloom.formats.contents import (
    BaseRecord,
    StoredAdapter,
    check_task,
    common_fields,
    names_in,
    stored_adapter,
)
from loraloom.formats.fields import write_fields

_PREFIX = "base_model.model."


def parse(files: AdapterFiles, method: type[AdapterConfig]) -> StoredAdapter:
    """Understand the files of an adapter."""
    check_task(files)
    unknown = [name for name in files.tensors if not name.startswith(_PREFIX)]
    if unknown:
        raise files.error(f"unexpected tensors: {names_in(unknown)}; names begin with {_PREFIX}")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in files.tensors.items()}
    return stored_adapter(files, method, "loraloom", tensors, files.section("loraloom"))


def render(
    config: AdapterConfig, tensors: dict[str, Tensor], base: BaseInfo, record: BaseRecord
) -> AdapterFiles:
    """Lay an adapter out under our own names."""
    return AdapterFiles(
        config=common_fields(config, base)
        | write_fields(config, base)
        | {"loraloom": record.to_json()},
        tensors={f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )
