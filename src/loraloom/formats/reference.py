"""Mixtures in the layout of MoE-PEFT, the reference implementation of MixLoRA.

    {method}.layers.{L}.{ffn}.moe_gate.weight                               a router of the block
    {method}.layers.{L}.{ffn}.moe_gate_bias.weight                          its bias, ours
    {method}.layers.{L}.{block}.{projection}.moe_gate.weight                a router of its own
    {method}.layers.{L}.{block}.{projection}.lora_A.weight                  and lora_B
    {method}.layers.{L}.{block}.{projection}.experts.{e}.lora_A.weight      and lora_B

MoE-PEFT saves a pickle and knows no magnitudes. loraloom writes the same fields and names to
safetensors, magnitudes as `….lora_magnitude_vector.weight`, the modules of families that the
reference lacks under transformers' own names, and what the reference has no field for under
`"loraloom"` in adapter_config.json.

Source: moe-peft 2.0.2, `moe_peft/adapters/`, `moe_peft/model.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.files import LORA_FIELDS, AdapterFiles
from loraloom.adapters.keys import TensorKey
from loraloom.adapters.method import AdapterConfig
from loraloom.errors import FormatError
from loraloom.formats.contents import (
    BaseRecord,
    StoredAdapter,
    check_task,
    common_fields,
    names_in,
    renamed,
    stored_adapter,
)
from loraloom.formats.fields import FFN_NAMES, write_fields

_KEY = re.compile(
    r"(?P<method>\w+)\.layers\.(?P<layer>\d{1,5})\.(?P<block>\w+)\.(?:(?P<projection>\w+)\.)?"
    r"(?:experts\.(?P<expert>\d{1,5})\.)?"
    r"(?P<part>moe_gate|moe_gate_bias|lora_A|lora_B|lora_magnitude_vector)\.weight",
    re.ASCII,
)
_OUR_PART = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "moe_gate": "router",
    "moe_gate_bias": "router_bias",
}
_KEPT_FIELDS = (
    *LORA_FIELDS.values(),
    "bias",
    "target_modules",
    "base_model_name_or_path",
    "task_type",
)
_THEIR_PART = {ours: theirs for theirs, ours in _OUR_PART.items()}


def without_experts(files: AdapterFiles) -> AdapterFiles:
    """See a mixture that targets attention alone as the LoRA that it is.

    Its routers weigh the base model's own FFN block by numbers that sum to 1.
    """
    kind, strategy = files.config.get("peft_type"), files.config.get("routing_strategy")
    prefix = f"{str(kind).lower()}.layers."
    is_mixture = kind == "LORAMOE" or (kind == "MIXLORA" and strategy in (None, "mixlora"))
    has_experts = any(".experts." in name for name in files.tensors)
    is_whole = all(name.startswith(prefix) for name in files.tensors)
    if not (is_mixture and files.tensors and is_whole) or has_experts:
        return files
    if FFN_NAMES & set(files.targets(())):
        return files
    return replace(
        files,
        config={name: files.config[name] for name in _KEPT_FIELDS if name in files.config}
        | {"peft_type": "LORA"},
        tensors={
            f"base_model.model.model.layers.{name.removeprefix(prefix)}": tensor
            for name, tensor in files.tensors.items()
            if not name.endswith(".moe_gate.weight")
        },
        program="moe-peft",
    )


def parse(files: AdapterFiles, method: type[AdapterConfig]) -> StoredAdapter:
    """Understand the files of a mixture."""
    check_task(files)
    tensors = _our_tensors(files, method)
    record = files.section("loraloom")
    activation = files.config.get("act_fn")
    return stored_adapter(files, method, "moe-peft", tensors, record, activation=activation)


def render(
    config: AdapterConfig, tensors: dict[str, Tensor], base: BaseInfo, record: BaseRecord
) -> AdapterFiles:
    """Lay a mixture out as MoE-PEFT does, with our additions under `loraloom`."""
    fields = write_fields(config, base)
    own: dict[str, Any] = record.to_json() | fields.pop("loraloom", {})
    common = {name: value for name, value in common_fields(config, base).items() if value}
    prefix = config.peft_type.lower()
    return AdapterFiles(
        config=common | fields | {"loraloom": own},
        tensors={_reference_name(name, prefix): tensor for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )


def _our_tensors(files: AdapterFiles, method: type[AdapterConfig]) -> dict[str, Tensor]:
    matches = {name: _KEY.fullmatch(name) for name in files.tensors}
    prefix = method.peft_type.lower()
    found = {
        name: match
        for name, match in matches.items()
        if match is not None and match["method"] == prefix
    }
    unknown = [name for name in files.tensors if name not in found]
    if unknown:
        raise files.error(
            f"unexpected tensors: {names_in(unknown)}; they are not a {method.peft_type} adapter's"
        )
    return renamed(files, {name: str(_our_key(match)) for name, match in found.items()})


def _our_key(match: re.Match[str]) -> TensorKey:
    expert = None if match["expert"] is None else int(match["expert"])
    part = _OUR_PART[match["part"]]
    return TensorKey(int(match["layer"]), match["block"], part, match["projection"], expert)


def _reference_name(name: str, prefix: str) -> str:
    key = TensorKey.parse(name)
    if key is None or key.part not in _THEIR_PART:
        raise FormatError(f"`{name}` is not a tensor that the reference's layout has")
    expert = None if key.expert is None else f"experts.{key.expert}"
    places = (f"{prefix}.layers.{key.layer}", key.block, key.projection, expert)
    return ".".join([*filter(None, places), _THEIR_PART[key.part], "weight"])
