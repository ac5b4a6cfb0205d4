"""A mixture's fields in the adapter_config.json of MoE-PEFT, the reference implementation.

What the reference has no field for goes under `"loraloom": {"adapter": …}`. MoE-PEFT refuses a
dropout of 0, which loraloom writes as it is.

Source: moe-peft 2.0.2, `moe_peft/adapters/mixlora/config.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.keys import target_projections
from loraloom.adapters.lora.files import lora_settings
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
    "method",
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "rank_stabilized",
    "weight_decomposition",
    "num_experts",
    "top_k",
    "experts",
}
"""Settings that the reference has a field for."""
_EXPERT_FIELDS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_INIT_NAMES = {"original": "kaiming", "gaussian": "gaussian"}


def settings_of(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read a mixture's settings.

    Settings of training that a file does not hold (MoE-PEFT saves none) are loraloom's defaults,
    not MoE-PEFT's: a load-balance coefficient of 0.01 where MoE-PEFT's code has 0.001, for
    instance. They change nothing until the adapter is trained on.

    Raises:
        FormatError: If the routing is not top-k MixLoRA, or a field is missing.
    """
    _check_method(files)
    return {
        **lora_settings(files, projections),
        **_training_settings(files),
        "num_experts": files.required("num_experts"),
        "top_k": files.config.get("top_k", 2),
        "experts": _expert_settings(files),
        **files.section("loraloom").get("adapter", {}),
    }


def reference_fields(config: MixLoraConfig, base: BaseInfo) -> dict[str, Any]:
    """Write a mixture's settings."""
    targets = target_projections(config.target_modules, base)
    fields = {
        "use_dora": True if config.weight_decomposition else None,
        "use_rslora": True if config.rank_stabilized else None,
        "bias": "none",
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": [path.rpartition(".")[2] for path in targets],
        "expert_lora": _expert_lora(config),
        "routing_strategy": "mixlora",
        "num_experts": config.num_experts,
        "act_fn": base.activation,
        "top_k": config.top_k,
    }
    own = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name not in _SAVED_SETTINGS
    }
    present = {name: value for name, value in fields.items() if value is not None}
    return present | {"loraloom": {"adapter": own}}


def _check_method(files: AdapterFiles) -> None:
    strategy = files.config.get("routing_strategy", "mixlora")
    if strategy != "mixlora":
        raise files.error(
            f"`routing_strategy` must be mixlora (top-k), got {shown(strategy)}, which loraloom "
            "doesn't support yet"
        )


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
    for name in ("use_dora", "use_rslora"):
        shared = files.config.get(name, False)
        if expert.get(name, shared) != shared:
            raise files.error(
                f"`expert_lora.{name}` must be the adapter's own, {shared}, "
                f"got {shown(expert[name])}"
            )
    own = {ours: expert[theirs] for ours, theirs in _EXPERT_FIELDS.items() if theirs in expert}
    return own or None


def _expert_lora(config: MixLoraConfig) -> dict[str, Any] | None:
    if config.experts is None:
        return None
    own: dict[str, Any] = {"bias": "none"}
    for ours, value in config.experts.model_dump(exclude_none=True).items():
        own[_EXPERT_FIELDS[ours]] = _whole(value) if ours == "alpha" else value
    return own


def _whole(alpha: float) -> float | int:
    """MoE-PEFT takes whole alphas only."""
    return int(alpha) if alpha.is_integer() else alpha
