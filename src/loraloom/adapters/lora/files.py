"""A LoRA's fields in PEFT's adapter_config.json.

Source: peft 0.21.2, `peft/tuners/lora/config.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.keys import target_projections
from loraloom.errors import shown

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo
    from loraloom.adapters.lora.config import LoraConfig

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


def settings_of(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read a LoRA's settings.

    Raises:
        FormatError: If a field says what loraloom can't represent.
    """
    _check_fields(files)
    gaussian = files.config.get("init_lora_weights") == "gaussian"
    return lora_settings(files, projections) | {"init": "gaussian" if gaussian else "kaiming"}


def lora_settings(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read the fields that PEFT's LoRA and the reference's mixtures share."""
    return {
        "rank": files.required("r"),
        "alpha": files.required("lora_alpha"),
        "dropout": files.config.get("lora_dropout", 0.0),
        "target_modules": files.targets(projections),
        "rank_stabilized": files.config.get("use_rslora", False),
        "weight_decomposition": files.config.get("use_dora", False),
    }


def peft_fields(config: LoraConfig, base: BaseInfo) -> dict[str, Any]:
    """Write a LoRA's settings.

    The fields are those of PEFT's that every version with DoRA knows (0.9 and later), so that
    none of them warns; PEFT fills in its defaults for the rest.
    """
    targets = target_projections(config.target_modules, base)
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "r": config.rank,
        "rank_pattern": {},
        "target_modules": [path.rpartition(".")[2] for path in targets],
        "use_dora": config.weight_decomposition,
        "use_rslora": config.rank_stabilized,
    }


def _check_fields(files: AdapterFiles) -> None:
    for name, value in sorted(files.config.items()):
        if name in _READ or name in _NO_EFFECT or not value or value == "none":
            continue
        remedy = _REMEDY.get(name, "train without it")
        raise files.error(
            f"`{name}` must be unset, got {shown(value)}: loraloom has none; {remedy}"
        )
    start = files.config.get("init_lora_weights", True)
    if start not in _PURE_STARTS:
        raise files.error(
            f"`init_lora_weights` must leave the base model's weights as they are, got "
            f"{shown(start)}; save it from PEFT with path_initial_model_for_weight_conversion, "
            "which makes it a plain LoRA"
        )
    if files.config.get("task_type") not in _TASK_TYPES:
        raise files.error(f"`task_type` must be CAUSAL_LM, got {shown(files.config['task_type'])}")
