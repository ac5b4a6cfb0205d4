"""A MoLA's fields in the adapter_config.json of MoE-PEFT.

What the reference has no field for goes under `"loraloom": {"adapter": …}`. It knows one number of
experts and top-k routing only; a list by layer stands in the same field.

Source: moe-peft 2.0.2, `moe_peft/adapters/mola/config.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.lora.files import lora_settings
from loraloom.adapters.reference import shared_fields

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo
    from loraloom.adapters.mola.config import MolaConfig

_OWN_SETTINGS = {
    "init",
    "routing",
    "top_p",
    "temperature",
    "expert_capacity",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_loss_scope",
}


def settings_of(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read a MoLA's settings.

    Raises:
        FormatError: If a field is missing or says what loraloom can't represent.
    """
    settings = lora_settings(files, projections)
    if settings.pop("weight_decomposition"):
        warnings.warn(
            f"{files.source}: `use_dora` is left out, as MoE-PEFT ignores it in a MoLA's experts",
            stacklevel=2,
        )
    return {
        **settings,
        "num_experts": files.required("num_experts"),
        "top_k": files.config.get("top_k", 2),
        **files.section("loraloom").get("adapter", {}),
    }


def reference_fields(config: MolaConfig, base: BaseInfo) -> dict[str, Any]:
    """Write a MoLA's settings."""
    return {
        **shared_fields(config, base, decomposed=False),
        "routing_strategy": "mola",
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "loraloom": {"adapter": config.model_dump(mode="json", include=_OWN_SETTINGS)},
    }
