"""Tensors of adapters on stacked experts: PEFT's `target_parameters`, and ours.

    {experts}.base_layer.lora_A.weight    of gate_up_proj, where down_proj has a LoRA too
    {experts}.lora_A.weight               of down_proj, or of the only parameter that has a LoRA

A is [E·R, I], with experts behind one another, and B [O, R·E], with the expert's number fastest.
Unsloth's files may say `lora_B_layout: grouped_by_expert`, where B is [O, E·R].

Ours are the canonical names with a projection, A [E, R, I] and B [E, O, R].

Axes: E experts of the base model, R rank, I in_features, O out_features.

Source: peft 0.21.2, `peft/tuners/lora/layer.py` (`ParamWrapper`).
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from loraloom.adapters.lora import pattern_value
from loraloom.adapters.tensor_names import is_meant
from loraloom.errors import shown
from loraloom.formats.experts import has_single_experts, stack_experts
from loraloom.formats.raw_files import CONFIG_FILE, RECORD, AdapterFiles

# Earlier versions stored A and B of parameters in another order.
_FIRST_VERSION = [0, 19, 1]
_OURS = re.compile(r"(?P<experts>.+)\.(?P<projection>\w+)\.(?P<part>lora_\w+(?:\.weight)?)")
_PEFTS = re.compile(
    r"(?P<experts>(?:\w+\.)*\w*experts)(?P<inner>\.base_layer)?\.(?P<part>lora_\w+(?:\.weight)?)",
    re.ASCII,
)
_PREFIX = "base_model.model."
_READ = ("target_parameters", "lora_B_layout")
# Of B's columns, as Unsloth calls them; PEFT's is the first.
_LAYOUTS = ("rank_major", "grouped_by_expert")


def write_stacks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name and lay out tensors of stacks, which have an axis of experts in front, as PEFT does."""
    projections = defaultdict[str, set[str]](set)
    for name, tensor in tensors.items():
        match = _OURS.fullmatch(name)
        if match is not None and tensor.dim() == 3:
            projections[match["experts"]].add(match["projection"])
    written = {}
    for name, tensor in tensors.items():
        match = _OURS.fullmatch(name)
        if match is None or match["projection"] not in projections[match["experts"]]:
            written[name] = tensor
            continue
        has_both = len(projections[match["experts"]]) > 1
        inner = ".base_layer" if has_both and match["projection"] != "down_proj" else ""
        if match["part"].startswith("lora_A"):
            tensor = tensor.flatten(0, 1).contiguous()
        elif match["part"].startswith("lora_B"):
            tensor = tensor.permute(1, 2, 0).flatten(1).contiguous()
        written[f"{match['experts']}{inner}.{match['part']}"] = tensor
    return written


def read_stacks(files: AdapterFiles) -> AdapterFiles:
    """Give tensors of stacked experts our names and axes, and name them as targets."""
    parameters = files.config.get("target_parameters")
    if not parameters:
        return stack_experts(files) if has_single_experts(files) else files
    _check_version(files)
    layout = _column_layout(files)
    tensors = {}
    targets = list(files.targets())
    for name, tensor in files.tensors.items():
        match = _PEFTS.fullmatch(name)
        if match is None:
            _refuse_router(files, name, parameters)
            tensors[name] = tensor
            continue
        experts = match["experts"].removeprefix(_PREFIX)
        names = [
            parameter.rpartition(".")[2]
            for parameter in parameters
            if is_meant(parameter, f"{experts}.{parameter.rpartition('.')[2]}")
        ]
        names.sort(key=lambda projection: projection == "down_proj")
        if not names:
            raise files.error(
                f"`target_parameters` must name the parameters that have tensors, got "
                f"{shown(parameters)} and {name}"
            )
        projection = names[0] if match["inner"] else names[-1]
        targets.append(f"{experts.rpartition('.')[2]}.{projection}")
        key = f"{experts}.{projection}"
        rank = pattern_value(files.section("rank_pattern"), key, files.config.get("r"))
        named = f"{match['experts']}.{projection}.{match['part']}"
        tensors[named] = _stacked(files, name, match["part"], tensor, rank, layout)
    config = {name: value for name, value in files.config.items() if name not in _READ}
    if not isinstance(config.get("target_modules"), str):
        config["target_modules"] = list(dict.fromkeys(targets))
    return replace(files, config=config, tensors=tensors)


def _refuse_router(files: AdapterFiles, name: str, parameters: Sequence[str]) -> None:
    module = name.rpartition(".lora_")[0]
    for parameter in parameters:
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and is_meant(path, module):
            raise files.error(
                f"`{parameter}` in `target_parameters` adapts a router, which is not supported; "
                "train with target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'] and "
                "target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'], for "
                "example, in place of all-linear"
            )


def _column_layout(files: AdapterFiles) -> str | None:
    """Read in which order B's columns are; None if the files leave that open."""
    layout = files.config.get("lora_B_layout")
    if layout is not None and layout not in _LAYOUTS:
        raise files.error(
            f"`lora_B_layout` must be one of {', '.join(_LAYOUTS)}, got {shown(layout)}"
        )
    # Unsloth wrote the second one, without a name, until September 2026.
    base = str(files.config.get("base_model_name_or_path") or "")
    is_unsloths = base.startswith("unsloth/") or "unsloth_fixed" in files.section("auto_mapping")
    if layout is None and (RECORD in files.metadata or not is_unsloths):
        return _LAYOUTS[0]
    return layout


def _stacked(
    files: AdapterFiles, name: str, part: str, tensor: Tensor, rank: Any, layout: str | None
) -> Tensor:
    if not part.startswith(("lora_A", "lora_B")):
        return tensor
    axis = 0 if part.startswith("lora_A") else 1
    is_valid = isinstance(rank, int) and rank > 0 and tensor.dim() == 2
    if not is_valid or tensor.shape[axis] % rank:
        raise files.error(
            f"{name} must have the rank, {rank}, for each expert on axis {axis}, got the shape "
            f"{tuple(tensor.shape)}"
        )
    if axis == 0:
        return tensor.unflatten(0, (-1, rank))
    if layout is None and rank not in (1, tensor.shape[1]):
        raise files.error(
            f"which order have B's columns? {CONFIG_FILE} lacks `lora_B_layout`, and Unsloth "
            'changed the order in September 2026. Add "lora_B_layout": "grouped_by_expert" to '
            "that file if an earlier Unsloth trained the adapter, or "
            '"lora_B_layout": "rank_major" if a later one or PEFT did'
        )
    if layout == _LAYOUTS[1]:
        return tensor.unflatten(1, (-1, rank)).transpose(0, 1)
    return tensor.unflatten(1, (rank, -1)).permute(2, 0, 1)


def _check_version(files: AdapterFiles) -> None:
    version = str(files.config.get("peft_version", "0.19.1"))
    numbers = [int(number) for number in re.findall(r"\d{1,9}", version)[:3]]
    if numbers < _FIRST_VERSION:
        raise files.error(
            f"`target_parameters` of PEFT {version} have A and B in another order; load the "
            "adapter with PEFT 0.19.1 or later and save it again"
        )
