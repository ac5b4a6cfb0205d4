"""The reference's layout before version 0.5.0, brought up to date before it is read.

    {method}.layers.{L}.gate.weight             now ….{L}.mlp.moe_gate.weight
    {method}.layers.{L}.experts.{e}.{p}.lora_A… now ….{L}.mlp.{p}.experts.{e}.lora_A…
    ….layers.{L}.self_attn.{p}.lora_A…          now ….layers.{L}.mlp.{p}.lora_A…   (FFN, plain LoRA)

Before 0.4 the FFN's projections were w1 (gate), w2 (down) and w3 (up). The routing was called
"mixtral" or "switch".

Source: mikecovlee/mLoRA 0.2.1 to 0.4.6, `mlora/model.py`, `mlora/common/modelargs.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from loraloom.adapters.files import AdapterFiles
from loraloom.errors import shown
from loraloom.formats.contents import renamed

_PROJECTIONS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_STRATEGIES = {"mixtral": "mixlora", "switch": "mixlora-switch"}
_ROUTER = re.compile(r"(\w+)\.layers\.(\d{1,5})\.gate\.weight")
_EXPERT = re.compile(r"(\w+)\.layers\.(\d{1,5})\.experts\.(\d{1,5})\.(\w+)\.(lora_[AB]\.weight)")
_MISPLACED = re.compile(
    r"(base_model\.model\.model\.layers\.\d+)\.self_attn\."
    r"(w[123]_proj|gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2)\.(lora_[AB]\.weight)"
)


def is_legacy(files: AdapterFiles) -> bool:
    """Tell by the routing's name or the tensors' whether an old version wrote these files."""
    if files.config.get("routing_strategy") in _STRATEGIES:
        return True
    return any(_current_name(name) != name for name in files.tensors)


def upgrade(files: AdapterFiles) -> AdapterFiles:
    """Rename what has another name today."""
    if files.config.get("sparse_step") is not None:
        got = shown(files.config["sparse_step"])
        raise files.error(
            f"`sparse_step` must be unset, got {got}: loraloom has a mixture in every layer"
        )
    return replace(
        files,
        config=_current_config(files.config),
        tensors=renamed(files, {name: _current_name(name) for name in files.tensors}),
    )


def _current_config(config: dict[str, Any]) -> dict[str, Any]:
    current = dict(config)
    strategy = config.get("routing_strategy")
    if strategy is not None:
        current["routing_strategy"] = _STRATEGIES.get(strategy, strategy)
    modules = config.get("target_modules")
    if isinstance(modules, dict):
        modules = [name for name, wanted in modules.items() if wanted]
    if isinstance(modules, list):
        current["target_modules"] = [_PROJECTIONS.get(name, name) for name in modules]
    return current


def _current_name(name: str) -> str:
    if match := _ROUTER.fullmatch(name):
        return f"{match[1]}.layers.{match[2]}.mlp.moe_gate.weight"
    if match := _EXPERT.fullmatch(name):
        method, layer, expert, projection, part = match.groups()
        projection = _PROJECTIONS.get(projection, projection)
        return f"{method}.layers.{layer}.mlp.{projection}.experts.{expert}.{part}"
    if match := _MISPLACED.fullmatch(name):
        layer, projection, part = match.groups()
        return f"{layer}.mlp.{_PROJECTIONS.get(projection, projection)}.{part}"
    return name
