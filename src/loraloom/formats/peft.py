"""Adapters in the layout of Hugging Face PEFT.

    base_model.model.{layers_path}.{L}.{block}.{projection}.lora_A.weight
    base_model.model.{layers_path}.{L}.{block}.{projection}.lora_B.weight
    base_model.model.{layers_path}.{L}.{block}.{projection}.lora_magnitude_vector

PEFT saves the magnitude without `.weight` and reads it either way; so do we. PEFT warns about any
field of adapter_config.json that it doesn't know, so what loraloom remembers of the base model
goes into the header of the safetensors file.

Source: peft 0.21.2, `peft/tuners/lora/{config,model}.py`, `peft/utils/save_and_load.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from torch import Tensor

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.keys import TensorKey
from loraloom.adapters.method import AdapterConfig
from loraloom.config.text import parse_json
from loraloom.errors import FormatError
from loraloom.formats.contents import (
    BaseRecord,
    StoredAdapter,
    common_fields,
    names_in,
    renamed,
    stored_adapter,
)
from loraloom.formats.fields import write_fields

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<layers_path>(?:\w+\.)*?\w+)\.(?P<layer>\d{1,5})\.(?P<block>\w+)\."
    r"(?P<projection>\w+)\.(?P<suffix>\w+(?:\.weight)?)",
    re.ASCII,
)
_SHARED = re.compile(r"base_model\.(?P<suffix>\w+)", re.ASCII)
"""A tensor that all layers share."""
_SUFFIXES = {
    "VERA": {
        "lambda_b": "vera_lambda_b",
        "lambda_d": "vera_lambda_d",
        "vera_A": "vera_A",
        "vera_B": "vera_B",
    }
}
_LORA_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
"""PEFT's endings of the parts that a method's tensors have; those of LoRA in all others."""


def parse(files: AdapterFiles, method: type[AdapterConfig]) -> StoredAdapter:
    """Understand the files of an adapter."""
    layers_path, tensors = _our_tensors(files, method)
    return stored_adapter(files, method, "peft", tensors, _record(files), layers_path=layers_path)


def render(
    config: AdapterConfig, tensors: dict[str, Tensor], base: BaseInfo, record: BaseRecord
) -> AdapterFiles:
    """Lay an adapter out as PEFT does."""
    fields = common_fields(config, base) | {"inference_mode": True, "revision": None}
    suffixes = _suffixes(type(config))
    return AdapterFiles(
        config=fields | write_fields(config, base),
        tensors={_peft_name(name, base, suffixes): tensor for name, tensor in tensors.items()},
        metadata={"format": "pt", "loraloom": json.dumps(record.to_json(), sort_keys=True)},
    )


def part_names(method: type[AdapterConfig]) -> list[str]:
    """How the names of the method's tensors end, without `.weight`."""
    return [suffix.removesuffix(".weight") for suffix in _suffixes(method).values()]


def _suffixes(method: type[AdapterConfig]) -> dict[str, str]:
    """PEFT's ending of each part that the method has."""
    return _SUFFIXES.get(method.peft_type, _LORA_SUFFIXES)


def _our_tensors(
    files: AdapterFiles, method: type[AdapterConfig]
) -> tuple[str | None, dict[str, Tensor]]:
    parts = {suffix.removesuffix(".weight"): part for part, suffix in _suffixes(method).items()}
    found, shared = {}, {}
    for name, tensor in files.tensors.items():
        match, of_all = _KEY.fullmatch(name), _SHARED.fullmatch(name)
        if match is not None and match["suffix"].removesuffix(".weight") in parts:
            found[name] = match
        elif of_all is not None and of_all["suffix"] in parts:
            shared[name] = f"shared.{parts[of_all['suffix']]}", tensor
    unknown = [name for name in files.tensors if name not in {*found, *shared}]
    if unknown:
        raise files.error(
            f"unexpected tensors: {names_in(unknown)}; they are not a {method.peft_type} adapter's"
        )
    paths = sorted({match["layers_path"] for match in found.values()})
    if len(paths) > 1:
        raise files.error(
            f"tensors must belong to one stack of decoder layers, got {names_in(paths)}; "
            "adapters of several parts of a model can't be read"
        )
    keys = {name: str(_our_key(match, parts)) for name, match in found.items()}
    tensors = renamed(files, keys) | dict(shared.values())
    return (paths[0] if paths else None), tensors


def _our_key(match: re.Match[str], parts: dict[str, str]) -> TensorKey:
    part = parts[match["suffix"].removesuffix(".weight")]
    return TensorKey(int(match["layer"]), match["block"], part, match["projection"])


def _record(files: AdapterFiles) -> dict[str, Any]:
    origin = f"{files.source}: `loraloom` in the weights' header"
    record = parse_json(files.metadata.get("loraloom", "{}"), origin, FormatError)
    return record if isinstance(record, dict) else {}


def _peft_name(name: str, base: BaseInfo, suffixes: dict[str, str]) -> str:
    shared = name.removeprefix("shared.")
    if shared != name:
        return f"base_model.{suffixes[shared]}"
    key = TensorKey.parse(name)
    if key is None or key.part not in suffixes or key.expert is not None:
        raise FormatError(f"`{name}` is not a tensor that PEFT's layout has")
    place = f"{base.layers_path}.{key.layer}.{key.block}.{key.projection}"
    return f"{_PREFIX}{place}.{suffixes[key.part]}"
