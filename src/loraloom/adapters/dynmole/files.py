"""A DynMoLE's fields in adapter_config.json, as its authors' code has them.

What they have no field for goes under `"loraloom": {"adapter": …}`.

Source: github.com/mikecovlee/DynMoLE, `moe_peft/adapters/dynmole/config.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.adapters.files import AdapterFiles
from loraloom.adapters.lora.files import lora_settings
from loraloom.adapters.reference import shared_fields
from loraloom.errors import shown

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo
    from loraloom.adapters.dynmole.config import DynMoleConfig

_SHARED_NAMES = ("keep_top_k", "top_p", "entropy_threshold", "entropy_index")
_OWN_SETTINGS = {"init", "router_entropy_loss_coef", "router_aux_loss_coef"}
_ENTROPY = {"entropy_type": "tsallis", "entropy_eps": 1e-5}


def settings_of(files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
    """Read a DynMoLE's settings.

    Raises:
        FormatError: If a field is missing or says what loraloom can't represent.
    """
    kind = files.config.get("entropy_type", "tsallis")
    if kind != "tsallis":
        raise files.error(f"`entropy_type` must be tsallis, got {shown(kind)}")
    settings = lora_settings(files, projections)
    if settings.pop("weight_decomposition"):
        raise files.error("`use_dora` must be unset: experts of a DynMoLE aren't decomposed")
    known = {name: files.config[name] for name in _SHARED_NAMES if name in files.config}
    return {
        **settings,
        **known,
        "num_experts": files.required("num_experts"),
        **files.section("loraloom").get("adapter", {}),
    }


def reference_fields(config: DynMoleConfig, base: BaseInfo) -> dict[str, Any]:
    """Write a DynMoLE's settings."""
    return {
        **shared_fields(config, base, decomposed=False),
        "routing_strategy": "dynmole",
        "num_experts": config.num_experts,
        **{name: getattr(config, name) for name in _SHARED_NAMES},
        **_ENTROPY,
        "loraloom": {"adapter": config.model_dump(mode="json", include=_OWN_SETTINGS)},
    }
