"""A mixture's fields in the adapter_config.json of MoE-PEFT, the reference implementation.

What the reference has no field for goes under `"loraloom": {"adapter": …}`. MoE-PEFT refuses a
dropout of 0, which loraloom writes as it is.

Source: moe-peft 2.0.2, `moe_peft/adapters/mixlora/config.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.adapters.files import LORA_FIELDS, AdapterFiles
from loraloom.adapters.lora.files import lora_settings, whole
from loraloom.adapters.own import OWN_FIELDS
from loraloom.adapters.reference import shared_fields
from loraloom.errors import shown

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo
    from loraloom.adapters.mixlora.config import MixLoraConfig

_TRAINING_FIELDS = {
    "router_init_range": "router_init_std",
    "jitter_noise": "router_jitter",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "router_z_loss_coef": "router_z_loss_coef",
}
"""Fields that MoE-PEFT reads but doesn't save."""
_SAVED_SETTINGS = {
    *OWN_FIELDS,
    *LORA_FIELDS,
    "method",
    "target_modules",
    "num_experts",
    "routing",
    "top_k",
    "top_p",
    "temperature",
    "experts",
}
"""Settings that the reference has a field for, or that stand in the same fields as PEFT's."""
_ROUTINGS = {"mixlora": "top_k", "mixlora-dynamic": "top_p", "mixlora-switch": "switch"}
"""Ours by `routing_strategy`. Dense routing is top-k of all experts in the reference's files."""
_NO_CAPACITY = 2**20
"""What stands for any number of tokens in the reference's files."""
_INIT_NAMES = {"original": "kaiming", "gaussian": "gaussian"}


def settings_of(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read a mixture's settings.

    Settings of training that a file does not hold (MoE-PEFT saves none) are loraloom's defaults,
    not MoE-PEFT's: a load-balance coefficient of 0.01 where MoE-PEFT's code has 0.001, for
    instance. They change nothing until the adapter is trained on.
    """
    return {
        **lora_settings(files, projections),
        **_training_settings(files),
        "num_experts": files.required("num_experts"),
        **_routing(files),
        "experts": _expert_settings(files),
        **files.section("loraloom").get("adapter", {}),
    }


def reference_fields(config: MixLoraConfig, base: BaseInfo) -> dict[str, Any]:
    """Write a mixture's settings."""
    saved = _SAVED_SETTINGS - ({"routing", "top_k"} if config.routing == "dense" else set())
    unlimited = {"expert_capacity"} if config.routing == "switch" else set()
    fields = {
        **shared_fields(config, base, decomposed=config.weight_decomposition),
        "expert_lora": _expert_lora(config),
        **_routing_fields(config),
        "num_experts": config.num_experts,
        "act_fn": base.activation or None,
    }
    settings = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name not in saved and (value is not None or name in unlimited)
    }
    present = {name: value for name, value in fields.items() if value is not None}
    return present | {"loraloom": {"adapter": settings}}


def _routing(files: AdapterFiles) -> dict[str, Any]:
    """Read how tokens choose experts; a temperature of 0 stands for none."""
    strategy = files.config.get("routing_strategy", "mixlora")
    if strategy not in _ROUTINGS:
        raise files.error(
            f"`routing_strategy` must be one of {', '.join(_ROUTINGS)}, got {shown(strategy)}"
        )
    fields = files.config
    own = {
        "top_k": {"top_k": fields.get("top_k", 2)},
        "top_p": {
            "top_p": fields.get("top_p", 0.8),
            "temperature": fields.get("temperature") or 1.0,
        },
        "switch": {"expert_capacity": fields.get("expert_capacity", 32)},
    }
    routing = _ROUTINGS[strategy]
    return {"routing": routing, **own[routing]}


def _routing_fields(config: MixLoraConfig) -> dict[str, Any]:
    """Write how tokens choose experts."""
    if config.routing == "top_p":
        temperature = 0.0 if config.temperature == 1 else config.temperature
        own = {"top_p": config.top_p, "temperature": temperature}
        return {"routing_strategy": "mixlora-dynamic", **own}
    if config.routing == "switch":
        capacity = config.expert_capacity or _NO_CAPACITY
        return {"routing_strategy": "mixlora-switch", "expert_capacity": capacity}
    top_k = config.num_experts if config.routing == "dense" else config.top_k
    return {"routing_strategy": "mixlora", "top_k": top_k}


def _training_settings(files: AdapterFiles) -> dict[str, Any]:
    """Settings of training, if someone has written them into the file by hand."""
    settings = {
        ours: files.config[theirs]
        for theirs, ours in _TRAINING_FIELDS.items()
        if files.config.get(theirs) is not None
    }
    if files.config.get("router_loss") is False:
        settings["router_aux_loss_coef"] = 0.0
    if "lora_init" in files.config:
        settings["init"] = _INIT_NAMES.get(files.config["lora_init"], files.config["lora_init"])
    return settings


def _expert_settings(files: AdapterFiles) -> dict[str, Any] | None:
    """Read `expert_lora`, which holds what differs from the adapter's own settings."""
    expert = files.section("expert_lora")
    own = {ours: expert[theirs] for ours, theirs in LORA_FIELDS.items() if theirs in expert}
    return own or None


def _expert_lora(config: MixLoraConfig) -> dict[str, Any] | None:
    if config.experts is None:
        return None
    own: dict[str, Any] = {"bias": "none"}
    for ours, value in config.experts.model_dump(exclude_none=True).items():
        own[LORA_FIELDS[ours]] = whole(value) if ours == "alpha" else value
    return own
