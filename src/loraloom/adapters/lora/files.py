"""A LoRA's fields in PEFT's adapter_config.json.

Source: peft 0.21.2, `peft/tuners/lora/config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraloom.adapters.files import LORA_FIELDS, AdapterFiles
from loraloom.adapters.keys import target_pattern
from loraloom.adapters.lora.selection import carried_over, is_pattern
from loraloom.errors import shown

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo
    from loraloom.adapters.lora.config import LoraConfig

_READ = {
    *LORA_FIELDS.values(),
    "alpha_pattern",
    "layers_pattern",
    "layers_to_transform",
    "rank_pattern",
    "target_modules",
}
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
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
    "trainable_token_indices",
}
"""Fields that don't change what the saved tensors compute, or are looked at elsewhere."""
_REMEDY = {
    "bias": "train with bias='none', or merge the biases into the base model",
    "lora_bias": "train with lora_bias=False",
}
_READ_STARTS = ("gaussian", "pissa", "olora")
"""Initialisations that stay an adapter's: PEFT's files mean the base without the last two."""
_NAMED_STARTS = (*_READ_STARTS, "orthogonal")
"""Those that files name; of an orthogonal one trained weights know nothing, which is computed."""
_KNOWN_STARTS = (True, False, "eva", "mica", *_NAMED_STARTS)
_MODULE = re.compile(
    r"base_model\.model\.(?P<module>(?:\w+\.)*?(?P<layer>0|[1-9][0-9]{0,5})\.(?P<path>\w+\.\w+))"
    r"\.lora_A(?:\.weight)?$"
)
"""A tensor of each adapted module."""
_TASK_TYPES = (None, "CAUSAL_LM", "QUESTION_ANS")


def settings_of(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read a LoRA's settings."""
    _check_fields(files)
    settings = lora_settings(files, projections)
    modules = _adapted_modules(files)
    return {
        **settings,
        "init": _init(files),
        "rank_pattern": _pattern(files, "rank_pattern", settings["rank"], modules),
        "alpha_pattern": _pattern(files, "alpha_pattern", settings["alpha"], modules),
        **_selection(files, list(modules.values())),
    }


def _init(files: AdapterFiles) -> str:
    """Name the initialisation; kaiming where trained weights know nothing of it."""
    start = files.config.get("init_lora_weights")
    return start if start in _READ_STARTS else "kaiming"


def _adapted_modules(files: AdapterFiles) -> dict[str, str]:
    """Name the modules that have tensors: as in the base model, and as keys.py has them."""
    found = {}
    for name in files.tensors:
        match = _MODULE.match(name)
        if match is not None:
            found[match["module"]] = f"layers.{match['layer']}.{match['path']}"
    return found


def _pattern(
    files: AdapterFiles, field: str, default: int | float, modules: dict[str, str]
) -> dict[str, Any]:
    patterns = files.section(field)
    for pattern in patterns:
        if not is_pattern(pattern):
            raise files.error(f"`{field}` must hold regular expressions, got {shown(pattern)}")
    return carried_over(patterns, default, modules) if modules else patterns


def _selection(files: AdapterFiles, keys: list[str]) -> dict[str, Any]:
    """Tell by the tensors which projections are adapted, where files leave some out.

    PEFT chooses them by patterns, layers and exclusions, and saves just those.
    """
    targets, layers = files.config.get("target_modules"), files.config.get("layers_to_transform")
    names_places = isinstance(targets, str) or any("." in str(name) for name in targets or ())
    chooses_layers = layers is not None and layers != []
    if not (names_places or chooses_layers or files.config.get("exclude_modules")):
        return {}
    if not keys:
        chosen = layers if isinstance(layers, list) else [layers]
        return {"layers": chosen} if chooses_layers else {}
    places = [(int(layer), path) for _, layer, path in (key.split(".", 2) for key in keys)]
    numbers, paths = {layer for layer, _ in places}, {path for _, path in places}
    if len(places) < len(numbers) * len(paths):
        return {"target_modules": [f"layers.{layer}.{path}" for layer, path in sorted(places)]}
    names = [path.rpartition(".")[2] for path in sorted(paths)]
    return {"target_modules": names, "layers": sorted(numbers)}


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
    names = _module_names(config, base)
    targets = _targets(config, base, names)
    by_layer = config.layers is not None and not isinstance(targets, str)  # a pattern has them
    alphas = {key: whole(alpha) for key, alpha in config.alpha_pattern.items()}
    return {
        "alpha_pattern": carried_over(alphas, config.alpha, names),
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": config.init if config.init in _NAMED_STARTS else True,
        "layers_pattern": None,
        "layers_to_transform": list(config.layers or ()) if by_layer else None,
        "lora_alpha": whole(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "r": config.rank,
        "rank_pattern": carried_over(config.rank_pattern, config.rank, names),
        "target_modules": targets,
        "use_dora": config.weight_decomposition,
        "use_rslora": config.rank_stabilized,
    }


def _targets(config: LoraConfig, base: BaseInfo, names: Mapping[str, str]) -> list[str] | str:
    """Name the targets; by a pattern where names alone would mean other modules too."""
    known = config.known_targets(base)
    if base.has_own_names:
        return list(known)
    if config.layers is not None or any("." in name for name in known):
        return "|".join(map(re.escape, names.values()))
    return target_pattern(config.target_modules, base)


def _module_names(config: LoraConfig, base: BaseInfo) -> dict[str, str]:
    """Name the adapted projections as the base model does, by their keys."""
    keys = [key for layer in range(base.num_layers) for key, _ in config.layer_shapes(base, layer)]
    return {
        f"layers.{key.layer}.{key.path}": f"{base.layers_path}.{key.layer}.{key.path}"
        for key in keys
    }


def whole(alpha: float) -> float | int:
    """Write a whole alpha without a point: MoE-PEFT takes no other."""
    return int(alpha) if alpha.is_integer() else alpha


def _check_fields(files: AdapterFiles) -> None:
    for name, value in sorted(files.config.items()):
        if name in _READ or name in _NO_EFFECT or not value or value == "none":
            continue
        remedy = _REMEDY.get(name, "train without it")
        raise files.error(
            f"`{name}` must be unset, got {shown(value)}: loraloom has none; {remedy}"
        )
    start = files.config.get("init_lora_weights", True)
    if start not in _KNOWN_STARTS:
        raise files.error(
            "`init_lora_weights` must leave the base model's weights as they are, or be pissa or "
            f"olora, got {shown(start)}; save it from PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if files.config.get("task_type") not in _TASK_TYPES:
        raise files.error(f"`task_type` must be CAUSAL_LM, got {shown(files.config['task_type'])}")
