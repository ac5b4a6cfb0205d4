"""What the fields of all of MoE-PEFT's mixtures have in common.

Source: moe-peft 2.0.2, `moe_peft/common/config.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraloom.adapters.config import LowRankConfig
from loraloom.adapters.files import LORA_FIELDS, AdapterFiles
from loraloom.adapters.keys import target_projections
from loraloom.adapters.lora.config import DecomposedConfig, LoraConfig
from loraloom.adapters.lora.files import whole

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo


def shared_fields(config: LowRankConfig, base: BaseInfo, *, decomposed: bool) -> dict[str, Any]:
    """Write what mixtures have of a LoRA."""
    targets = target_projections(config.target_modules, base)
    fields = {
        "bias": "none",
        "r": config.rank,
        "lora_alpha": whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": [path.rpartition(".")[2] for path in targets],
    }
    flags = {"use_dora": decomposed, "use_rslora": config.rank_stabilized}
    return {name: True for name, flag in flags.items() if flag} | fields


_FFN_NAMES = {
    "gate_proj",
    "up_proj",
    "down_proj",
    "fc1",
    "fc2",
    "gate_up_proj",
    "dense_h_to_4h",
    "dense_4h_to_h",
}
"""Projections on which the reference's mixtures have experts."""
_KNOWN_NAMES = _FFN_NAMES | {"q_proj", "k_proj", "v_proj", "o_proj", "dense", "qkv_proj"}
_KEPT_FIELDS = (
    *LORA_FIELDS.values(),
    "bias",
    "target_modules",
    "base_model_name_or_path",
    "task_type",
)


def without_experts(files: AdapterFiles, method: type[LowRankConfig]) -> AdapterFiles:
    """See a mixture that targets attention alone as the LoRA that it is.

    Its routers weigh the base model's own FFN block by numbers that sum to 1.
    """
    prefix = f"{method.peft_type.lower()}.layers."
    is_mixture = files.config.get("peft_type") == method.peft_type
    has_experts = any(".experts." in name for name in files.tensors)
    is_whole = all(name.startswith(prefix) for name in files.tensors)
    if not (is_mixture and files.tensors and is_whole) or has_experts:
        return files
    if _FFN_NAMES & set(files.targets(())):
        return files
    return replace(
        files,
        config={name: files.config[name] for name in _KEPT_FIELDS if name in files.config}
        | {"peft_type": LoraConfig.peft_type},
        tensors={
            f"base_model.model.model.layers.{name.removeprefix(prefix)}": tensor
            for name, tensor in files.tensors.items()
            if not name.endswith(".moe_gate.weight")
        },
        program="moe-peft",
    )


def lora_fault(config: DecomposedConfig, base: BaseInfo) -> str | None:
    """Say what of a LoRA's settings MoE-PEFT can't hold; None if it holds them all."""
    names = [path.rpartition(".")[2] for path in target_projections(config.target_modules, base)]
    unknown = [name for name in names if name not in _KNOWN_NAMES]
    if unknown:
        return f"MoE-PEFT has no model with {', '.join(unknown)}"
    if base.layers_path != "model.layers" or not base.has_own_names:
        return f"MoE-PEFT has no {base.model_type or 'such base model'}"
    if config.weight_decomposition:
        return "MoE-PEFT's files have no place for the magnitudes of a DoRA"
    return alpha_fault(config.alpha)


def alpha_fault(alpha: float) -> str | None:
    """Say what is wrong with an alpha for MoE-PEFT; None if nothing is."""
    return None if alpha.is_integer() else f"MoE-PEFT takes a whole alpha, got {alpha:g}"
