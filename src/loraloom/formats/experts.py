"""LoRAs on a mixture's experts: PEFT's `target_parameters`, of single experts, and ours.

PEFT's have tensors of stacked experts:

    {experts}.base_layer.lora_A.weight    of gate_up_proj, where down_proj has a LoRA too
    {experts}.lora_A.weight               of down_proj, or of the only parameter that has a LoRA

A is [E·R, I], with experts behind one another, and B [O, R·E], with the expert's number fastest.
Unsloth's files may say `lora_B_layout: grouped_by_expert`, where B is [O, E·R].

Those of single experts are joined to one LoRA on the stack:

    {experts}.{e}.{gate_proj|up_proj|down_proj}.lora_A.weight    of one expert; or w1, w3, w2

Gate and up become one projection, which is exact: with the rank of the files where both have one
A or only one of them has a LoRA, else with twice the rank and a block-diagonal B, as PEFT does.

Ours are the canonical names with a projection, A [E, R, I] and B [E, O, R].

Axes: E experts of the base model, R rank, I in_features, F feed-forward, O out_features.

Source: peft 0.21.2, `peft/tuners/lora/layer.py` (`ParamWrapper`),
`peft/utils/transformers_weight_conversion.py`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraloom.adapters.lora import pattern_value
from loraloom.base.targets import is_meant
from loraloom.errors import shown
from loraloom.formats.raw_files import CONFIG_FILE, RECORD, AdapterFiles

# Types whose stacks have rows of gate and up in turn.
INTERLEAVED = ("gpt_oss",)
_PREFIX = "base_model.model."
# Earlier versions stored A and B of parameters in another order.
_FIRST_VERSION = [0, 19, 1]
_OURS = re.compile(r"(?P<experts>.+)\.(?P<projection>\w+)\.(?P<part>lora_\w+(?:\.weight)?)")
_PEFTS = re.compile(
    r"(?P<experts>(?:\w+\.)*\w*experts)(?P<inner>\.base_layer)?\.(?P<part>lora_\w+(?:\.weight)?)",
    re.ASCII,
)
# Of B's columns, as Unsloth calls them; PEFT's is the first.
_LAYOUTS = ("rank_major", "grouped_by_expert")
_EXPERT = re.compile(
    r"(?P<path>(?:\w+\.)*\w*experts)\.(?P<expert>0|[1-9]\d{0,4})\."
    r"(?P<projection>gate_proj|up_proj|down_proj|w[123])\.lora_(?P<side>[AB])(?:\.weight)?",
    re.ASCII,
)
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


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
    """Give tensors of stacked experts our names and axes."""
    _check_version(files)
    layout = _column_layout(files)
    parameters = files.config["target_parameters"]
    ranks = files.section("rank_pattern")
    tensors = {}
    for name, tensor in files.tensors.items():
        match = _PEFTS.fullmatch(name)
        if match is None:
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
        key = f"{experts}.{projection}"
        rank = pattern_value(ranks, key, files.config.get("r"))
        named = f"{match['experts']}.{projection}.{match['part']}"
        tensors[named] = _stacked(files, name, match["part"], tensor, rank, layout)
    return replace(files, tensors=tensors)


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


class _Lora(NamedTuple):
    A: Tensor  # (E, R, I)
    B: Tensor  # (E, O, R)


def has_single_experts(files: AdapterFiles) -> bool:
    """Whether other programs' files have tensors of single experts."""
    if files.config.get("peft_type") != "LORA" or RECORD in files.metadata:
        return False
    return any(_EXPERT.fullmatch(name) for name in files.tensors)


def stack_experts(files: AdapterFiles) -> AdapterFiles:
    """Stack the tensors of single experts under our names."""
    rank, alpha = _common_rank(files)
    rest = {name: t for name, t in files.tensors.items() if not _EXPERT.fullmatch(name)}
    blocks = _read_blocks(files, rank)
    pairs = [(block.get("gate_proj"), block.get("up_proj")) for block in blocks.values()]
    is_doubled = any(gate and up and not torch.equal(gate.A, up.A) for gate, up in pairs)
    tensors = dict(rest)
    names = dict[str, int]()
    for path, block in blocks.items():
        leaf = path.rpartition(".")[2]
        gate = block.get("gate_proj")
        up = block.get("up_proj")
        down = block.get("down_proj")
        gate_up = _join(gate, up, is_doubled)
        for projection, lora in (("gate_up_proj", gate_up), ("down_proj", down)):
            if lora is not None:
                names[f"{leaf}.{projection}"] = lora.A.shape[1]
                tensors[f"{path}.{projection}.lora_A.weight"] = lora.A
                tensors[f"{path}.{projection}.lora_B.weight"] = lora.B
    ranks = {}
    alphas = {}
    for name, stacked_rank in names.items():
        pattern = re.escape(name)
        factor = stacked_rank / rank
        if files.config.get("use_rslora"):
            factor = factor**0.5
        ranks[pattern] = stacked_rank
        alphas[pattern] = alpha * factor
    config = files.config | {
        "rank_pattern": ranks | files.section("rank_pattern"),
        "alpha_pattern": alphas | files.section("alpha_pattern"),
    }
    if not isinstance(config.get("target_modules"), str):
        # In PEFT a name such as `gate_proj` means modules of single experts as well.
        modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in rest}
        config["target_modules"] = [
            target for target in files.targets() if target.rpartition(".")[2] in modules
        ]
    return replace(files, config=config, tensors=tensors)


def _common_rank(files: AdapterFiles) -> tuple[int, float]:
    ranks = files.section("rank_pattern")
    alphas = files.section("alpha_pattern")
    settings = set()
    for name in filter(_EXPERT.fullmatch, files.tensors):
        module = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
        rank = pattern_value(ranks, module, files.config.get("r"))
        alpha = pattern_value(alphas, module, files.config["lora_alpha"])
        settings.add((rank, float(alpha)))
    if len(settings) > 1:
        raise files.error(
            "experts must have one rank and one alpha to be stacked, got (rank, alpha) "
            f"{shown(sorted(settings))}; train experts without rank_pattern and alpha_pattern"
        )
    return settings.pop()  # ty: ignore[invalid-explicit-return]


def _read_blocks(files: AdapterFiles, rank: int) -> dict[str, dict[str, _Lora]]:
    """Stack the LoRAs of each block's experts, by projection."""
    tensors = defaultdict[str, dict[tuple[str, str, int], Tensor]](dict)
    for name, tensor in files.tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            projection = _PROJECTIONS.get(match["projection"], match["projection"])
            key = (projection, match["side"], int(match["expert"]))
            if key in tensors[match["path"]]:
                raise files.error(f"{name} must be one tensor, got another for that projection")
            tensors[match["path"]][key] = tensor
    blocks = defaultdict[str, dict[str, _Lora]](dict)
    for path, experts in tensors.items():
        num_experts = 1 + max(expert for _, _, expert in experts)
        for projection in sorted({projection for projection, _, _ in experts}):
            sides = dict[str, Tensor]()
            for side, axis in (("A", 0), ("B", 1)):
                chosen = [experts.get((projection, side, e)) for e in range(num_experts)]
                present = [tensor for tensor in chosen if tensor is not None]
                shapes = {tuple(tensor.shape) for tensor in present}
                is_valid = len(present) == num_experts and len(shapes) == 1
                is_valid = is_valid and present[0].dim() == 2 and present[0].shape[axis] == rank
                if not is_valid:
                    raise files.error(
                        f"{path} must have lora_{side} of {projection} for all {num_experts} "
                        f"experts, with rank {rank}, got {len(present)} of shapes "
                        f"{shown(sorted(shapes))}; save a LoRA that all experts have"
                    )
                sides[side] = torch.stack(present)
            blocks[path][projection] = _Lora(A=sides["A"], B=sides["B"])
    return blocks


def _join(gate: _Lora | None, up: _Lora | None, is_doubled: bool) -> _Lora | None:
    """Make one LoRA of gate's and up's rows, gate's first."""
    if gate is None:
        if up is None:
            return None
        gate = _Lora(up.A, torch.zeros_like(up.B))
    if up is None:
        up = _Lora(gate.A, torch.zeros_like(gate.B))
    if not is_doubled:
        return _Lora(gate.A, torch.cat([gate.B, up.B], 1))  # (E, 2F, R)
    rank = gate.A.shape[1]
    lora_A = torch.cat([gate.A, up.A], 1)  # (E, 2R, I)
    gate_B = pad(gate.B, (0, rank))
    up_B = pad(up.B, (rank, 0))
    return _Lora(lora_A, torch.cat([gate_B, up_B], 1))  # (E, 2F, 2R)
