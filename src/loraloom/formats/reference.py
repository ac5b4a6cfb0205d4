"""Mixtures in the layout of MoE-PEFT, the reference implementation of MixLoRA.

    mixlora.layers.{L}.{ffn}.moe_gate.weight
    mixlora.layers.{L}.{attention}.{projection}.lora_A.weight              and lora_B
    mixlora.layers.{L}.{ffn}.{projection}.experts.{e}.lora_A.weight        and lora_B

MoE-PEFT saves a pickle and knows no magnitudes. loraloom writes the same fields and names to
safetensors, magnitudes as `….lora_magnitude_vector.weight`, the modules of families that the
reference lacks under transformers' own names, and what the reference has no field for under
`"loraloom"` in adapter_config.json. MoE-PEFT refuses a dropout of 0, which loraloom writes as is.

Source: moe-peft 2.0.2, `moe_peft/adapters/mixlora/config.py`, `moe_peft/model.py`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from loraloom.config.adapter import MixLoraConfig
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

_KEY = re.compile(
    r"mixlora\.layers\.(?P<layer>\d+)\.(?P<block>\w+)\."
    r"(?:(?P<router>moe_gate\.weight)"
    r"|(?P<projection>\w+)\.(?:experts\.(?P<expert>\d+)\.)?"
    r"(?P<part>lora_A|lora_B|lora_magnitude_vector)\.weight)"
)
_OUR_PART = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "magnitude"}
_SUFFIX_OF_PART = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector.weight",
    "router": "moe_gate.weight",
}

_TRAINING_FIELDS = {
    "router_init_range": "router_init_std",
    "jitter_noise": "router_jitter",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "router_z_loss_coef": "router_z_loss_coef",
}
"""Fields that MoE-PEFT reads but doesn't save."""
_SAVED_FIELDS = {
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
"""Fields of MixLoraConfig that the reference has a field for."""
_EXPERT_FIELDS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_INIT_NAMES = {"original": "kaiming", "gaussian": "gaussian"}


def parse(files: AdapterFiles) -> StoredAdapter:
    """Understand the files of a mixture.

    Settings of training that a file does not hold (MoE-PEFT saves none) are loraloom's defaults,
    not MoE-PEFT's: a load-balance coefficient of 0.01 where MoE-PEFT's code has 0.001, say. They
    change nothing until the adapter is trained on.

    Raises:
        FormatError: If the routing is not top-k MixLoRA, a field is missing or out of range, or a
            tensor is not a mixture's.
    """
    _check_method(files)
    tensors = _our_tensors(files)
    record = files.section("loraloom")
    fields = {
        **lora_fields(files, tensors),
        **_training_fields(files),
        "num_experts": files.required("num_experts"),
        "top_k": files.config.get("top_k", 2),
        "experts": _expert_fields(files),
        **record.get("adapter", {}),
    }
    return StoredAdapter(
        layout="moe-peft",
        config=build_config(files, MixLoraConfig, fields),
        tensors=tensors,
        base=BaseRecord.from_files(files, record),
        source=files.source,
        activation=files.config.get("act_fn"),
    )


def render(
    config: MixLoraConfig, tensors: dict[str, Tensor], base: BaseInfo, record: BaseRecord
) -> AdapterFiles:
    """Lay a mixture out as MoE-PEFT does, with our additions under `loraloom`."""
    own = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name not in _SAVED_FIELDS
    }
    return AdapterFiles(
        config=_reference_config(config, base) | {"loraloom": record.to_json() | {"adapter": own}},
        tensors={_reference_name(name): tensor for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )


def _check_method(files: AdapterFiles) -> None:
    strategy = files.config.get("routing_strategy", "mixlora")
    if strategy != "mixlora":
        raise files.error(
            f"`routing_strategy` must be mixlora (top-k), got {strategy!r}, which loraloom "
            "doesn't support yet"
        )
    if files.config.get("task_type") == "SEQ_CLS" or "classifier" in files.tensors:
        raise files.error("`task_type` must be CAUSAL_LM, got SEQ_CLS: it has a head of its own")
    if files.config.get("bias", "none") != "none":
        raise files.error(f"`bias` must be none, got {files.config['bias']!r}")


def _our_tensors(files: AdapterFiles) -> dict[str, Tensor]:
    matches = {name: _KEY.fullmatch(name) for name in files.tensors}
    unknown = [name for name, match in matches.items() if match is None]
    if unknown:
        raise files.error(f"unexpected tensors: {names_in(unknown)}; they are not a MixLoRA's")
    return {
        str(_our_key(match)): files.tensors[name]
        for name, match in matches.items()
        if match is not None
    }


def _our_key(match: re.Match[str]) -> TensorKey:
    layer, block = int(match["layer"]), match["block"]
    if match["router"]:
        return TensorKey(layer, block, "router")
    expert = None if match["expert"] is None else int(match["expert"])
    return TensorKey(layer, block, _OUR_PART[match["part"]], match["projection"], expert)


def _training_fields(files: AdapterFiles) -> dict[str, Any]:
    """Settings of training, if someone has written them into the file by hand."""
    fields = {
        ours: files.config[theirs]
        for theirs, ours in _TRAINING_FIELDS.items()
        if files.config.get(theirs) is not None
    }
    if files.config.get("router_loss") is False:
        fields["router_aux_loss_coef"] = 0.0
    if "lora_init" in files.config:
        fields["init"] = _INIT_NAMES.get(files.config["lora_init"], files.config["lora_init"])
    return fields


def _expert_fields(files: AdapterFiles) -> dict[str, Any] | None:
    """Read `expert_lora`, which holds what differs from the adapter's own settings."""
    expert = files.section("expert_lora")
    for name in ("use_dora", "use_rslora"):
        shared = files.config.get(name, False)
        if expert.get(name, shared) != shared:
            raise files.error(
                f"`expert_lora.{name}` must be the adapter's own, {shared}, got {expert[name]}"
            )
    own = {ours: expert[theirs] for ours, theirs in _EXPERT_FIELDS.items() if theirs in expert}
    return own or None


def _reference_config(config: MixLoraConfig, base: BaseInfo) -> dict[str, Any]:
    targets = [path.rpartition(".")[2] for path in target_projections(config, base)]
    fields = {
        "use_dora": True if config.weight_decomposition else None,
        "use_rslora": True if config.rank_stabilized else None,
        "bias": "none",
        "peft_type": "MIXLORA",
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "expert_lora": _expert_lora(config),
        "routing_strategy": "mixlora",
        "num_experts": config.num_experts,
        "act_fn": base.activation,
        "top_k": config.top_k,
        "base_model_name_or_path": base.name_or_path or None,
        "task_type": "CAUSAL_LM",
    }
    return {name: value for name, value in fields.items() if value is not None}


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


def _reference_name(name: str) -> str:
    key = TensorKey.parse(name)
    if key is None:
        raise FormatError(f"`{name}` is not the name of an adapter's tensor")
    expert = None if key.expert is None else f"experts.{key.expert}"
    parts = (f"mixlora.layers.{key.layer}", key.block, key.projection, expert)
    return ".".join([*filter(None, parts), _SUFFIX_OF_PART[key.part]])
