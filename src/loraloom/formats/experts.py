"""LoRAs on single experts of a mixture, joined to one LoRA on the stacked experts.

    {experts}.{e}.{gate_proj|up_proj|down_proj}.lora_A.weight    of one expert; or w1, w3, w2

Gate and up become one projection, which is exact: with the rank of the files where both have one
A or only one of them has a LoRA, else with twice the rank and a block-diagonal B, as PEFT does.

Axes: E experts of the base model, R rank, I in_features, F feed-forward, O out_features.

Source: peft 0.21.2, `peft/utils/transformers_weight_conversion.py`.
"""

import re
from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraloom.adapters.lora import pattern_value
from loraloom.errors import shown
from loraloom.formats.raw_files import RECORD, AdapterFiles

# Types whose stacks have rows of gate and up in turn.
INTERLEAVED = ("gpt_oss",)
_PREFIX = "base_model.model."
_EXPERT = re.compile(
    r"(?P<path>(?:\w+\.)*\w*experts)\.(?P<expert>0|[1-9]\d{0,4})\."
    r"(?P<projection>gate_proj|up_proj|down_proj|w[123])\.lora_(?P<side>[AB])(?:\.weight)?",
    re.ASCII,
)
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


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
        modules = [name.rpartition(".lora_")[0] for name in rest]
        used = {module.rpartition(".")[2] for module in modules}
        targets = [target for target in files.targets() if target.rpartition(".")[2] in used]
        config["target_modules"] = [*targets, *names]
    return replace(files, config=config, tensors=tensors)


def _common_rank(files: AdapterFiles) -> tuple[int, float]:
    settings = set()
    for name in filter(_EXPERT.fullmatch, files.tensors):
        module = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
        rank = pattern_value(files.section("rank_pattern"), module, files.config.get("r"))
        alpha = pattern_value(files.section("alpha_pattern"), module, files.config["lora_alpha"])
        settings.add((rank, float(alpha)))
    if len(settings) > 1:
        raise files.error(
            "experts must have one rank and one alpha to be stacked, got (rank, alpha) "
            f"{shown(sorted(settings))}; train experts without rank_pattern and alpha_pattern"
        )
    return settings.pop()


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
