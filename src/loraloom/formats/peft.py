"""Plain LoRA and DoRA in the layout of Hugging Face PEFT.

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

from loraloom.config.adapter import LoraConfig
from loraloom.errors import FormatError
from loraloom.formats.base import BaseInfo
from loraloom.formats.contents import (
    AdapterFiles,
    BaseRecord,
    StoredAdapter,
    build_config,
    lora_fields,
    names_in,
)
from loraloom.formats.keys import TensorKey, target_projections

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<layers_path>(?:\w+\.)*?\w+)\.(?P<layer>\d+)\.(?P<block>\w+)\."
    r"(?P<projection>\w+)\.(?P<part>lora_A\.weight|lora_B\.weight"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
_PART_OF_SUFFIX = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_SUFFIX_OF_PART = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}

_READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora"}
_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
"""Fields that don't change what the saved tensors compute, or are looked at elsewhere."""
_REMEDY = {
    "rank_pattern": "train with one rank for all modules",
    "alpha_pattern": "train with one lora_alpha for all modules",
    "modules_to_save": "merge these modules into the base model",
    "bias": "train with bias='none', or merge the biases into the base model",
    "lora_bias": "train with lora_bias=False",
    "layers_to_transform": "train on all layers",
}
_PURE_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base model's weights alone."""
_TASK_TYPES = (None, "CAUSAL_LM", "QUESTION_ANS")


def parse(files: AdapterFiles) -> StoredAdapter:
    """Understand the files of a plain adapter.

    Raises:
        FormatError: If a field says what loraloom can't represent, a value is out of range, or a
            tensor is not a LoRA's.
    """
    _check_fields(files)
    layers_path, tensors = _our_tensors(files)
    gaussian = files.config.get("init_lora_weights") == "gaussian"
    fields = lora_fields(files, tensors) | {"init": "gaussian" if gaussian else "kaiming"}
    return StoredAdapter(
        layout="peft",
        config=build_config(files, LoraConfig, fields),
        tensors=tensors,
        base=BaseRecord.from_files(files, _record(files)),
        source=files.source,
        layers_path=layers_path,
    )


def render(
    config: LoraConfig, tensors: dict[str, Tensor], base: BaseInfo, record: BaseRecord
) -> AdapterFiles:
    """Lay a plain adapter out as PEFT does.

    The fields are those of PEFT's that every version with DoRA knows (0.9 and later), so that
    none of them warns; PEFT fills in its defaults for the rest.
    """
    return AdapterFiles(
        config=_peft_config(config, base),
        tensors={_peft_name(name, base): tensor for name, tensor in tensors.items()},
        metadata={"format": "pt", "loraloom": json.dumps(record.to_json(), sort_keys=True)},
    )


def _check_fields(files: AdapterFiles) -> None:
    for name, value in sorted(files.config.items()):
        if name in _READ or name in _NO_EFFECT or not value or value == "none":
            continue
        remedy = _REMEDY.get(name, "train without it")
        raise files.error(f"`{name}` must be unset, got {value!r}: loraloom has none; {remedy}")
    start = files.config.get("init_lora_weights", True)
    if start not in _PURE_STARTS:
        raise files.error(
            f"`init_lora_weights` must leave the base model's weights as they are, got {start!r}; "
            "save it from PEFT with path_initial_model_for_weight_conversion, which makes it a "
            "plain LoRA"
        )
    if files.config.get("task_type") not in _TASK_TYPES:
        raise files.error(f"`task_type` must be CAUSAL_LM, got {files.config['task_type']!r}")


def _our_tensors(files: AdapterFiles) -> tuple[str | None, dict[str, Tensor]]:
    matches = {name: _KEY.fullmatch(name) for name in files.tensors}
    unknown = [name for name, match in matches.items() if match is None]
    if unknown:
        raise files.error(f"unexpected tensors: {names_in(unknown)}; loraloom reads LoRA and DoRA")
    found = {name: match for name, match in matches.items() if match is not None}
    paths = sorted({match["layers_path"] for match in found.values()})
    if len(paths) > 1:
        raise files.error(
            f"tensors must belong to one stack of decoder layers, got {names_in(paths)}; "
            "adapters of several parts of a model can't be read"
        )
    tensors = {str(_our_key(match)): files.tensors[name] for name, match in found.items()}
    return (paths[0] if paths else None), tensors


def _our_key(match: re.Match[str]) -> TensorKey:
    part = _PART_OF_SUFFIX[match["part"]]
    return TensorKey(int(match["layer"]), match["block"], part, match["projection"])


def _record(files: AdapterFiles) -> dict[str, Any]:
    try:
        record = json.loads(files.metadata.get("loraloom", "{}"))
    except json.JSONDecodeError as error:
        raise files.error(f"`loraloom` in the weights' header is not JSON: {error}") from error
    return record if isinstance(record, dict) else {}


def _peft_config(config: LoraConfig, base: BaseInfo) -> dict[str, Any]:
    targets = [path.rpartition(".")[2] for path in target_projections(config, base)]
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base.name_or_path or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": config.weight_decomposition,
        "use_rslora": config.rank_stabilized,
    }


def _peft_name(name: str, base: BaseInfo) -> str:
    key = TensorKey.parse(name)
    if key is None or key.part not in _SUFFIX_OF_PART or key.expert is not None:
        raise FormatError(f"`{name}` is not a tensor of a plain LoRA; PEFT's layout has none such")
    place = f"{base.layers_path}.{key.layer}.{key.block}.{key.projection}"
    return f"{_PREFIX}{place}.{_SUFFIX_OF_PART[key.part]}"
