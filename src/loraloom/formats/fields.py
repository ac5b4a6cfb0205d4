"""Settings of methods in adapter_config.json: a table of their names and ours, read both ways.

Methods that PEFT or MoE-PEFT stores have a table, by `peft_type`; others have their settings under
our own names. What MoE-PEFT's layout has no field for goes under `"loraloom": {"adapter": …}`.

Source: peft 0.21.2, `peft/tuners/{lora,vera}/config.py`; moe-peft 2.0.2,
`moe_peft/adapters/*/config.py`; github.com/mikecovlee/DynMoLE, the same file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loraloom import adapters
from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.extra_modules import MODULES, OWN_FIELDS, own_parts
from loraloom.adapters.lora import ALL_EXPERTS, pattern_value
from loraloom.adapters.tensor_names import TensorKey
from loraloom.base.blocks import BLOCK_KINDS, BaseInfo, BaseProjection
from loraloom.base.targets import (
    is_meant,
    is_renamed_by_peft,
    matches,
    peft_target_modules,
    peft_target_parameters,
)
from loraloom.config.fields import checked
from loraloom.errors import FormatError, shown
from loraloom.formats.raw_files import CONFIG_FILE, AdapterFiles

Settings = dict[str, Any]

# PEFT's names of a LoRA's settings by ours.
LORA_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rank_stabilized": "use_rslora",
    "weight_decomposition": "use_dora",
}


@dataclass(frozen=True)
class _Table:
    """A method's fields: their names by ours, and those that say the same in all files.

    Settings whose fields have another form are read and written by functions; `written` names them.
    """

    names: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[AdapterFiles], Settings] = lambda files: {}
    write: Callable[[Any, BaseInfo], Settings] = lambda config, base: {}
    written: Callable[[Any], set[str]] = lambda config: set()
    moe_peft: Mapping[str, Any] | None = None
    """Settings of which MoE-PEFT's program has this value alone; None: it lacks the method."""


# Those of a table's fields that files must have.
_REQUIRED = ("r", "lora_alpha", "num_experts")


def read_config(
    files: AdapterFiles, method: type[AdapterConfig], tensors: Mapping[str, Tensor]
) -> AdapterConfig:
    """Read a method's configuration; `tensors`, by our keys, say what else is adapted."""
    keys = [key for key in map(TensorKey.parse, tensors) if key is not None]
    paths = [f"{key.block}.{key.projection}" for key in keys if key.projection is not None]
    settings = _read_settings(files, method, paths) | _own_settings(files, tensors)
    return build_config(files, method, settings)


def build_config(
    files: AdapterFiles, method: type[AdapterConfig], settings: dict[str, Any]
) -> AdapterConfig:
    """Make a method's configuration of settings in files, and of those that the user gives."""
    merged = dict(settings)
    for name, value in files.overrides.items():
        if isinstance(settings.get(name), dict) and isinstance(value, Mapping):
            merged[name] = {**settings[name], **value}  # sections are merged key by key
        else:
            merged[name] = value
    origin = f"{CONFIG_FILE} with the given settings" if files.overrides else CONFIG_FILE
    return checked(method, merged, FormatError, f"{files.source}: {origin} is not valid: ")


def _read_settings(
    files: AdapterFiles, method: type[AdapterConfig], paths: Sequence[str]
) -> Settings:
    """Read a method's settings; the targets are those listed, and the projections with tensors."""
    # What is adapted is told by tensors when the adapter meets a base model (files.py).
    listed = files.targets()
    targets = tuple(dict.fromkeys([*listed, *map(last_words, paths)]))
    extra = files.section("loraloom").get("adapter", {})
    table = TABLES.get(method.peft_type)
    if table is None:
        names = {name: name for name in method.model_fields}
        settings = _renamed(files.config, names) | extra
        return {"target_modules": targets} | settings if targets else settings
    for name in _REQUIRED:
        if name in table.names.values() and name not in files.config:
            raise files.error(f"{CONFIG_FILE} lacks the required field `{name}`")
    settings = {"target_modules": targets} | _renamed(files.config, table.names)
    return settings | table.read(files) | extra


def _own_settings(files: AdapterFiles, tensors: Mapping[str, Tensor]) -> Settings:
    """Read the settings of own modules; which ones they mean is told by tensors, if there are any.

    PEFT saves embeddings and head without their being named where they were resized.
    """
    names = files.config.get("modules_to_save") or []
    paths: dict[str, None] = {}
    for key in tensors:
        if key.startswith(MODULES):
            paths[key.removeprefix(MODULES).rpartition(".")[0]] = None
    named = [path for path in paths if any(is_meant(name, path) for name in names)]
    if len(named) < len(paths):
        # PEFT's names may be the ends of words
        others = [name for name in names if not any(path.endswith(name) for path in paths)]
        names = [*paths, *others]
    settings = {name: files.config.get(name) for name in OWN_FIELDS} | {"modules_to_save": names}
    return {name: value for name, value in settings.items() if value}


def _renamed(fields: Settings, names: Mapping[str, str]) -> Settings:
    return {new: fields[old] for new, old in names.items() if old in fields}


def write_fields(config: AdapterConfig, base: BaseInfo) -> Settings:
    settings = config.model_dump(mode="json")
    table = TABLES.get(config.peft_type)
    if table is None:
        # Null is as good as no field, which would mean the default.
        defaults = {name: field.default for name, field in type(config).model_fields.items()}
        nulls = {n: None for n in settings if settings[n] is None and defaults[n] is not None}
        return settings | {"loraloom": {"adapter": nulls}} if nulls else settings
    fields = {theirs: settings[ours] for ours, theirs in table.names.items()}
    fields |= {"bias": "none", **table.constants}
    if config.layout == "peft":
        fields |= _peft_targets(config, base)
    else:
        layers = base.layers_without_weights()
        named = config.with_targets(config.targeted_keys(layers), layers)
        fields["target_modules"] = list(named.target_modules)
    fields |= table.write(config, base)
    if "lora_alpha" in fields:
        fields["lora_alpha"] = _without_point(fields["lora_alpha"])
    if config.layout != "reference":
        return fields
    for flag in ("use_dora", "use_rslora"):
        if not fields.get(flag):
            fields.pop(flag, None)
    return fields | {"loraloom": {"adapter": _without_fields(table, config, settings)}}


def write_own_fields(config: AdapterConfig, base: BaseInfo) -> Settings:
    """Write own modules; PEFT takes every module whose path ends so, even within a word."""
    names = []
    for path in own_parts(config, base).modules:
        last = path.rpartition(".")[2]
        is_only = sum(module.endswith(last) for module in base.modules) == 1
        names.append(last if path in (base.embedding, base.head) and is_only else path)
    fields = config.model_dump(mode="json", include={*OWN_FIELDS}) | {"modules_to_save": names}
    return {name: value for name, value in fields.items() if value}


def _without_fields(table: _Table, config: AdapterConfig, settings: Settings) -> Settings:
    """Choose the settings that a table's library has no field for."""
    written = {*table.names, *table.written(config), *OWN_FIELDS, "method", "target_modules"}
    extra = {}
    for name, value in settings.items():
        # Null has a meaning in the capacity of switch routing alone.
        has_meaning = name == "expert_capacity" and settings.get("routing") == "switch"
        if name not in written and (value is not None or has_meaning):
            extra[name] = value
    return extra


def _peft_targets(config: AdapterConfig, base: BaseInfo) -> Settings:
    """Name what is adapted, so that it is exactly this in PEFT."""
    adapted = config.adapted(base.layers_without_weights())
    modules = []
    parameters = []
    for projection in adapted:
        path = _peft_path(projection, config, base)
        if path.endswith(".weight") or projection.num_experts is not None:
            parameters.append(path)
        elif projection.has_weight:
            modules.append(path)
    layers = getattr(config, "layers", None)
    targets = peft_target_modules(modules, base, layers)
    if isinstance(targets, list):  # updates next to a block have no module in PEFT
        targets += dict.fromkeys(p.name for p in adapted if not p.has_weight)
    fields: Settings = {"target_modules": targets}
    if layers is not None:
        fields["layers_to_transform"] = list(layers)
    if parameters:
        fields["target_parameters"] = peft_target_parameters(parameters, base)
    return fields


def _peft_path(projection: BaseProjection, config: AdapterConfig, base: BaseInfo) -> str:
    """Name a module as PEFT calls it, or the parameter that PEFT adapts there."""
    path = projection.key.replace("layers", base.layers_path, 1)
    is_stack = projection.num_experts is not None
    # PEFT translates the names of LoRAs alone.
    if config.peft_type != "LORA" or is_stack or not is_parameter_in_peft(projection, base):
        return path
    return f"{path}.weight"


def is_parameter_in_peft(projection: BaseProjection, base: BaseInfo) -> bool:
    """Whether PEFT reaches a projection by `target_parameters` alone, where it has plain LoRAs."""
    if projection.num_experts is not None:
        return True
    return projection.has_weight and is_renamed_by_peft(projection.name, base)


def last_words(path: str) -> str:
    """Name a projection by the last word of its path; weights of experts with their module."""
    block, _, name = path.rpartition(".")
    return f"experts.{name}" if block.rpartition(".")[2] == "experts" else name


def listed_targets(files: AdapterFiles) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the targets whose linear layers must have tensors, and in which layers; None: in all.

    Patterns and exclusions are left to the tensors.
    """
    layers = files.config.get("layers_to_transform")
    if files.config.get("exclude_modules") or files.config.get("layers_pattern"):
        return (), None
    if isinstance(layers, int):  # which may be 0
        layers = [layers]
    listed = [name for name in files.targets() if name not in BLOCK_KINDS]
    return tuple(map(str, listed)), tuple(layers) if layers else None


def _without_point(alpha: float) -> float | int:
    """Write a whole alpha without a point: MoE-PEFT takes no other."""
    return int(alpha) if float(alpha).is_integer() else alpha


# LoRA and DoRA: PEFT's fields that every version with DoRA (0.9 and later) knows, so that none of
# them warns; it fills in its defaults for the rest.

_READ = {
    *LORA_FIELDS.values(),
    *"alpha_pattern bias layers_pattern layers_to_transform rank_pattern".split(),
    *"target_modules target_parameters".split(),
}
# Fields that don't change what the saved tensors compute, or are looked at elsewhere.
_NO_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config "
    "exclude_modules inference_mode init_lora_weights loftq_config lora_B_layout lora_ga_config "
    "loraloom megatron_core modules_to_save peft_type peft_version qalora_group_size revision "
    "task_type "
    "trainable_token_indices".split()
)
# Initialisations that leave the base model's weights as they are.
_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# A tensor of each adapted module.
_MODULE = re.compile(
    r"base_model\.model\.(?P<module>(?:\w+\.)*?(?P<layer>0|[1-9][0-9]{0,5})\.(?P<path>(?:\w+\.){1,3}\w+))"
    r"\.lora_A(?:\.weight)?$"
)


def _read_lora(files: AdapterFiles) -> Settings:
    for name, value in sorted(files.config.items()):
        if value and value != "none" and name not in _READ | _NO_EFFECT:
            raise files.error(
                f"`{name}` is not supported, got {shown(value)}; train without `{name}`"
            )
    start = files.config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise files.error(
            "`init_lora_weights` must leave the base model's weights as they are, got "
            f"{shown(start)}; save it from PEFT with path_initial_model_for_weight_conversion, "
            "which makes it a plain LoRA"
        )
    parameters = files.config.get("target_parameters") or []
    modules: dict[str, str] = {}  # those with tensors: as in the base model, and our names
    for name, tensor in files.tensors.items():
        match = _MODULE.match(name)
        if match is None:
            continue
        module = match["module"]
        # Patterns are of a parameter where a linear layer's weight was named.
        names_weight = any(is_meant(target, f"{module}.weight") for target in parameters)
        if names_weight and tensor.dim() == 2:
            module = f"{module}.weight"
        modules[module] = f"layers.{match['layer']}.{match['path']}"
    ranks = files.section("rank_pattern")
    alphas = files.section("alpha_pattern")
    if modules:
        ranks = _carried_over(ranks, files.config["r"], modules)
        alphas = _carried_over(alphas, files.config["lora_alpha"], modules)
    settings: Settings = {
        "init": "gaussian" if start == "gaussian" else "kaiming",
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return settings


def _carried_over(
    patterns: Mapping[str, Any], default: Any, names: Mapping[str, str]
) -> dict[str, Any]:
    """Make patterns that say of modules under new names what others say under the old ones."""
    # They are the same ones if these will do, without those that match nothing; else names.
    used = {
        pattern: value
        for pattern, value in patterns.items()
        if any(matches(pattern, name) for name in names)
    }
    values = {new: pattern_value(used, old, default) for old, new in names.items()}
    if all(pattern_value(used, new, default) == value for new, value in values.items()):
        return used
    return {re.escape(new): value for new, value in values.items() if value != default}


def _write_lora(config: Any, base: BaseInfo) -> Settings:
    adapted = config.adapted(base.layers_without_weights())
    names = {p.key: _peft_path(p, config, base) for p in adapted}
    alphas = {key: _without_point(alpha) for key, alpha in config.alpha_pattern.items()}
    fields: Settings = {}
    # PEFT has no field for these.
    settings = config.model_dump(mode="json", include={*ALL_EXPERTS}, exclude_defaults=True)
    if settings:
        fields["loraloom"] = {"adapter": settings}
    return fields | {
        "alpha_pattern": _carried_over(alphas, config.alpha, names),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "rank_pattern": _carried_over(config.rank_pattern, config.rank, names),
    }


# MixLoRA. MoE-PEFT refuses a dropout of 0, which loraloom writes as it is.

# Ours by `routing_strategy`. Dense routing is top-k of all experts in the reference's files.
_ROUTINGS = {"mixlora": "top_k", "mixlora-dynamic": "top_p", "mixlora-switch": "switch"}
# What stands for any number of tokens in the reference's files.
_NO_CAPACITY = 2**20


def _read_mixlora(files: AdapterFiles) -> Settings:
    fields = files.config
    expert = files.section("expert_lora")
    strategy = fields.get("routing_strategy", "mixlora")
    if strategy not in _ROUTINGS:
        raise files.error(
            f"`routing_strategy` must be one of {', '.join(_ROUTINGS)}, got {shown(strategy)}"
        )
    routing = _ROUTINGS[strategy]
    settings = {"routing": routing, "experts": _renamed(expert, LORA_FIELDS) or None}
    if routing == "top_k":
        settings["top_k"] = fields.get("top_k", 2)
    elif routing == "top_p":
        settings["top_p"] = fields.get("top_p", 0.8)
        settings["temperature"] = fields.get("temperature") or 1.0  # 0 stands for none
    else:
        settings["expert_capacity"] = fields.get("expert_capacity", 32)
    return settings


def _write_mixlora(config: Any, base: BaseInfo) -> Settings:
    fields: Settings = {"act_fn": base.activation} if base.activation else {}
    if config.experts is not None:
        settings = config.experts.model_dump(exclude_none=True)
        expert = {LORA_FIELDS[ours]: value for ours, value in settings.items()}
        if "lora_alpha" in expert:
            expert["lora_alpha"] = _without_point(expert["lora_alpha"])
        fields["expert_lora"] = {"bias": "none", **expert}
    if config.routing == "top_p":
        temperature = 0.0 if config.temperature == 1 else config.temperature
        routing = {"routing_strategy": "mixlora-dynamic", "top_p": config.top_p}
        return fields | routing | {"temperature": temperature}
    if config.routing == "switch":
        capacity = config.expert_capacity or _NO_CAPACITY
        return fields | {"routing_strategy": "mixlora-switch", "expert_capacity": capacity}
    top_k = config.num_experts if config.routing == "dense" else config.top_k
    return fields | {"routing_strategy": "mixlora", "top_k": top_k}


def _written_by_mixlora(config: Any) -> set[str]:
    names = {"top_p", "temperature", "experts"}
    return names if config.routing == "dense" else names | {"routing", "top_k"}


# DynMoLE. In experts of a MoLA, MoE-PEFT ignores `use_dora`, and so does its table here.


def _read_dynmole(files: AdapterFiles) -> Settings:
    kind = files.config.get("entropy_type", "tsallis")
    if kind != "tsallis":
        raise files.error(f"`entropy_type` must be tsallis, got {shown(kind)}")
    return {}


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


_UNDECOMPOSED = {ours: name for ours, name in LORA_FIELDS.items() if ours != "weight_decomposition"}

# The methods that other libraries store.
TABLES: dict[str, _Table] = {
    adapters.LoraConfig.peft_type: _Table(
        LORA_FIELDS,
        {"fan_in_fan_out": False}
        | dict.fromkeys("auto_mapping layers_pattern layers_to_transform modules_to_save".split()),
        read=_read_lora,
        write=_write_lora,
        moe_peft={"layers": None, "rank_pattern": {}, "alpha_pattern": {}, **ALL_EXPERTS},
    ),
    adapters.VeraConfig.peft_type: _Table(
        {"rank": "r", "dropout": "vera_dropout", "projection_seed": "projection_prng_key"}
        | _same("d_initial save_projection"),
        read=lambda files: {"save_projection": "base_model.vera_A" in files.tensors},
    ),
    adapters.MixLoraConfig.peft_type: _Table(
        LORA_FIELDS | _same("num_experts"),
        read=_read_mixlora,
        write=_write_mixlora,
        written=_written_by_mixlora,
        moe_peft={},
    ),
    adapters.MolaConfig.peft_type: _Table(
        _UNDECOMPOSED | _same("num_experts top_k"),
        {"routing_strategy": "mola"},
        moe_peft={"routing": "top_k"},
    ),
    adapters.LoraMoeConfig.peft_type: _Table(
        LORA_FIELDS | _same("num_experts"), {"routing_strategy": "loramoe"}, moe_peft={}
    ),
    adapters.DynMoleConfig.peft_type: _Table(
        _UNDECOMPOSED
        | _same("num_experts keep_top_k top_p entropy_threshold entropy_index entropy_eps"),
        {"routing_strategy": "dynmole", "entropy_type": "tsallis"},
        read=_read_dynmole,
    ),
}
