"""An adapter as one plain LoRA: what vLLM keeps of it.

The experts of an FFN block lie behind one another along the rank. The router becomes the LoRA of a
linear layer that isn't there, `router` (`router_pair`). Nothing else needs to be known of an
adapter, so each may have experts, top_k, rank and scaling of its own.

Axes: I in_features, O out_features, D hidden, E experts, R rank, S = E·R.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraloom.adapters.contract import Adapter, AdapterConfig, Projection
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.segment import MoeFfn
from loraloom.base.blocks import BaseLayer, BaseProjection
from loraloom.base.structure import read_structure
from loraloom.errors import AdapterError, ConfigError, shown
from loraloom.formats.files import fit_to_base, read_stored

# The largest top_k of a mixture; FFN blocks compute this many experts of each token.
MAX_TOP_K = "LORALOOM_MAX_TOP_K"
# Those that vLLM takes for --max-lora-rank.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# A float32 is the sum of this many bfloat16.
PIECES = 3


class FoldedAdapter(NamedTuple):
    """A LoRA with a scaling of 1: float32 tensors by names as in PEFT's files, its largest rank."""

    tensors: dict[str, Tensor]
    rank: int
    top_k: int | None  # None without routers


class Folder:
    """Reads adapters for a base model whose weights aren't at hand."""

    def __init__(self, config: Any):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        structure = read_structure(model)
        self._base = structure.info
        self._layers = [_weightless(layer) for layer in structure.layers]

    def fold(self, path: str | Path) -> FoldedAdapter:
        stored = read_stored(path)
        refuse_own_parts(stored.config, stored.source, "be served by vLLM")
        # the base's weights aren't here to be compared with those it was trained on
        stored = replace(stored, base=stored.base.model_copy(update={"fingerprint": None}))
        config, tensors = fit_to_base(stored, self._base)
        if any(name.endswith(".magnitude") for name in config.tensor_shapes(self._base)):
            raise AdapterError(
                f"{stored.source}: weight decomposition scales rows of the base model's own "
                "weights, which no LoRA can, so vLLM cannot serve this adapter; use the embedded "
                "engine, or export the adapter merged (a mixture as an MoE checkpoint)"
            )
        for projection in config.adapted(self._layers):
            if projection.num_experts is not None or not projection.has_weight:
                raise AdapterError(
                    f"{stored.source}: {projection.key} is of a mixture-of-experts block, where "
                    "the vLLM plug-in serves no adapters; use the embedded engine"
                )
        adapter = config.build(stored.source, self._layers, torch.float32, seed=0)
        adapter.load_tensors(tensors)
        with torch.no_grad():
            return _fold(adapter, self._base.layers_path, stored.source)


def _fold(adapter: Adapter, layers_path: str, source: str) -> FoldedAdapter:
    tensors: dict[str, Tensor] = {}
    rank, top_k = 1, None
    for layer in adapter.base_layers:
        place = f"base_model.model.{layers_path}.{layer.index}"
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for block in layer.blocks:
            projections = adapter.weights_on(block)
            for name, projection in projections.items():
                pairs[f"{block.path}.{name}"] = _pair_of(projection, source)
            if block.gating is not None and not adapter.is_mergeable:
                moe = adapter.as_moe(block)
                columns = max(projection.num_columns for projection in projections.values())
                pairs[f"{block.path}.router"] = router_pair(moe, columns)
                top_k = moe.top_k
        for name, (lora_A, lora_B) in pairs.items():
            rank = max(rank, len(lora_A), lora_B.shape[1])
            tensors[f"{place}.{name}.lora_A.weight"] = lora_A
            tensors[f"{place}.{name}.lora_B.weight"] = lora_B
    return FoldedAdapter(tensors, rank, top_k)


def needs_folding(config: AdapterConfig) -> bool:
    """Whether vLLM would load it wrongly: it knows no router, and one scaling of all modules."""
    patterns = config.model_dump(include={"rank_pattern", "alpha_pattern"})
    return config.experts_per_router > 0 or any(patterns.values())


def router_pair(moe: MoeFfn, num_columns: int) -> tuple[Tensor, Tensor]:
    """Write a router down as A and B of a LoRA."""
    # A, [3E, D], has each expert's row in three pieces, so that float32 is kept where LoRAs are in
    # 16 bits: x Aᵀ, added up by three, are the logits. B, [2, S], has first each column's
    # expert, counted from 1 (0 is no expert's), and in its second row E and top_k.
    lora_A = split_in_pieces(moe.router.float()).flatten(0, 1)
    lora_B = torch.zeros(2, max(num_columns, 2))
    rank = num_columns // moe.num_experts
    lora_B[0, :num_columns] = 1 + torch.arange(moe.num_experts).repeat_interleave(rank)
    lora_B[1, :2] = torch.tensor([moe.num_experts, moe.top_k])
    return lora_A, lora_B


def split_in_pieces(values: Tensor) -> Tensor:
    """Split float32 [E, D] into numbers that bfloat16 can hold, [E, 3, D], which add up to them."""
    pieces, rest = [], values
    for _ in range(PIECES):
        pieces.append(rest.bfloat16().float())
        rest = rest - pieces[-1]
    return torch.stack(pieces, dim=1)


def _pair_of(projection: Projection, source: str) -> tuple[Tensor, Tensor]:
    """A, [S, I], and B with its scaling, [O, S]."""
    if projection.maps_rank_space:
        raise AdapterError(
            f"{source}: vLLM can serve only routers of whole FFN blocks, got one on "
            f"{projection.path}; serve this adapter with the embedded engine"
        )
    return projection.compute_A(torch.float32), projection.compute_B(torch.float32).T.contiguous()


class _Weightless(BaseProjection):
    """A projection of which the shape is known alone; adapters on it are in memory."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def _weightless(layer: BaseLayer) -> BaseLayer:
    blocks = []
    for block in layer.blocks:
        bases = block.projections.items()
        projections = {name: _Weightless(base.linear, base.key) for name, base in bases}
        blocks.append(replace(block, projections=projections))
    return replace(layer, blocks=tuple(blocks))


def max_top_k() -> int:
    text = os.environ.get(MAX_TOP_K, "2")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{MAX_TOP_K} must be a whole number of 1 or more, got {shown(text)}")
    return int(text)


def fitting_rank(rank: int) -> int:
    """The --max-lora-rank for a rank; vLLM refuses what is larger than all."""
    return next((possible for possible in _RANKS if possible >= rank), rank)
