"""A LoRAMoE's fields in the adapter_config.json of MoE-PEFT.

What the reference has no field for goes under `"loraloom": {"adapter": …}`.

Source: moe-peft 2.0.2, `moe_peft/adapters/loramoe/config.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.lora.files import lora_settings
from loraloom.adapters.reference import shared_fields

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo
    from loraloom.adapters.loramoe.config import LoraMoeConfig

_OWN_SETTINGS = {"init", "balance_coef", "balance_delta"}


def settings_of(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read a LoRAMoE's settings.

    Raises:
        FormatError: If a field is missing.
    """
    return {
        **lora_settings(files, projections),
        "num_experts": files.required("num_experts"),
        **files.section("loraloom").get("adapter", {}),
    }


def reference_fields(config: LoraMoeConfig, base: BaseInfo) -> dict[str, Any]:
    """Write a LoRAMoE's settings."""
    return {
        **shared_fields(config, base, decomposed=config.weight_decomposition),
        "routing_strategy": "loramoe",
        "num_experts": config.num_experts,
        "loraloom": {"adapter": config.model_dump(mode="json", include=_OWN_SETTINGS)},
    }
