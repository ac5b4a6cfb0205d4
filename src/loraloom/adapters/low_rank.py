"""Methods that work on each projection by itself, in rank space: what lies between its A and B.

From a `Projection` come, without more code, the fused path of attention, the FFN block, stacked
decoding, shared A products, packing, checkpointing and files.

Axes: I in_features, O out_features, R rank, S rows of B.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from loraloom.adapters.contract import MAX_NUMBER, Adapter, AdapterConfig, Adjustable, Projection
from loraloom.adapters.segment import SegmentTokens
from loraloom.base.blocks import BaseLayer, BaseProjection, Block
from loraloom.ops.expert_ffn import FfnRows, FfnWeights, mapped_ffn
from loraloom.ops.expert_weights import ExpertSide, ExpertWeights
from loraloom.ops.lean_expert_ffn import lean_expert_ffn
from loraloom.ops.low_rank import InputGroup, UpProjection
from loraloom.ops.stacked import StackedFfn, stack_ffn_weights


class LowRankConfig(AdapterConfig):
    """What methods share whose updates are s·B(A(x)), with one rank and scaling."""

    alpha: float = Field(default=32.0, gt=0, le=MAX_NUMBER)
    """Numerator of the scaling s = alpha / rank (alpha / sqrt(rank) when rank_stabilized)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank), as rsLoRA does."""
    init: Adjustable[Literal["kaiming", "gaussian"]] = "kaiming"
    """Start of A: Kaiming uniform with a = sqrt(5), or normal with std 1 / rank. B starts at 0."""

    @property
    def scaling(self) -> float:
        if self.rank_stabilized:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        layers = projection_layers(
            self, base_layers, lambda base, block: self.projection(base, block, dtype, seed)
        )
        return LowRankAdapter(name, self, base_layers, layers)

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        """Make the weights on one projection; a method that has none overrides `build` instead."""
        raise NotImplementedError


class DecomposedConfig(LowRankConfig):
    """A LoRA on each projection, or a DoRA: what plain adapters and experts have in common."""

    weight_decomposition: bool = False
    """Train the norm of each output row separately: DoRA, or MixDoRA in a mixture."""

    @property
    def title(self) -> str:  # ty: ignore[incompatible-property-override]
        return "DoRA" if self.weight_decomposition else "LoRA"

    @property
    def needs_weights(self) -> bool:  # ty: ignore[incompatible-property-override]
        return self.weight_decomposition


class LowRankAdapter(Adapter):
    """An adapter whose method works on each projection by itself."""

    def ffn_weights(self, block: Block, dtype: torch.dtype) -> FfnWeights | ExpertWeights:
        return ffn_weights(self.weights_on(block), block, dtype)

    def ffn(
        self,
        block: Block,
        weights: FfnWeights,
        hidden_states: Tensor,
        outputs: Sequence[Tensor],
        tokens: SegmentTokens,
    ) -> FfnRows:
        """Compute the block in the lean form where nothing lies between A and B."""
        dtype = outputs[0].dtype
        dropout = self.ffn_dropout(block, 1, dtype, tokens)
        hidden_states = hidden_states.to(dtype)
        if weights.is_plain:
            return lean_expert_ffn(hidden_states, outputs, weights, None, block.gating, dropout)
        return mapped_ffn(hidden_states, outputs, weights, block.gating, dropout, tokens)

    def stack_key(self) -> Hashable:
        computes = self.is_as_in(LowRankAdapter, "ffn", "group_low_rank")
        return (type(self.config), self._shapes) if computes else None

    @classmethod
    def stack_ffn(
        cls, adapters: Sequence[LowRankAdapter], block: Block, weights: Sequence[FfnWeights]
    ) -> StackedFfn:
        return stack_ffn_weights(weights)


def projection_layers(
    config: AdapterConfig,
    base_layers: Sequence[BaseLayer],
    build: Callable[[BaseProjection, Block], Projection],
) -> list[nn.ModuleDict]:
    """Build the weights on targeted projections, by layer and the names of block and projection."""
    keys = config.targeted_keys(base_layers)
    layers = list[nn.ModuleDict]()
    for layer in base_layers:
        blocks = nn.ModuleDict()
        for block in layer.blocks:
            names = block.names_of(keys)
            projections = {name: build(block.projections[name], block) for name in names}
            blocks[block.module_name] = nn.ModuleDict(projections)
        layers.append(blocks)
    return layers


def input_group(modules: Sequence[Projection], dtype: torch.dtype) -> InputGroup:
    """Stack the A of projections that share an input; keep the B side of each by name."""
    # One product with all A reads the input once.
    matrices = [module.compute_A(dtype) for module in modules]
    projections: dict[str, UpProjection] = {}
    start = 0
    for module, lora_A in zip(modules, matrices, strict=True):
        columns = slice(start, start + len(lora_A))
        start = columns.stop
        projections[module.name] = UpProjection(
            columns,
            module.compute_B(dtype),
            module.row_scale(),
            module.base.compute_bias(dtype),
            module.between if module.maps_rank_space else None,
        )
    stacked = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    return InputGroup(stacked, projections)


def ffn_weights(
    projections: Mapping[str, Projection], block: Block, dtype: torch.dtype, num_experts: int = 1
) -> FfnWeights | ExpertWeights:
    """Bring the weights on an FFN block's projections into compute form."""
    if block.num_experts is not None:
        return _expert_weights(projections, block, dtype, num_experts)
    # In each projection's A those of `num_experts` experts lie behind one another.
    inputs = [projections[name] for name in block.groups[0] if name in projections]
    siblings = input_group(inputs, dtype) if inputs else None
    output = projections.get(block.output.name)
    output_group = None if output is None else input_group([output], dtype)
    input_sides = {} if siblings is None else siblings.projections
    return FfnWeights(
        input_A=None if siblings is None else siblings.A,
        inputs=[input_sides.get(name) for name in block.groups[0]],
        down_A=None if output_group is None else output_group.A,
        down=None if output_group is None else output_group.projections[block.output.name],
        num_experts=num_experts,
        rank=next(iter(projections.values())).num_columns // num_experts,
        width=block.output.in_features,
    )


def _expert_weights(
    projections: Mapping[str, Projection], block: Block, dtype: torch.dtype, num_choices: int
) -> ExpertWeights:
    sides = []
    places = num_adapted = None
    for (name,) in block.groups:
        projection: Any = projections.get(name)
        sides.append(None if projection is None else _expert_side(projection, dtype))
        if projection is not None and projection.kept is not None:
            places = projection.places
            num_adapted = len(projection.kept)
    up, down = sides
    return ExpertWeights(up, down, num_choices, places, num_adapted)


def _expert_side(projection: Projection, dtype: torch.dtype) -> ExpertSide:
    lora_A = projection.compute_A(dtype)
    lora_B = projection.compute_B(dtype)
    # Grouped products are one kernel where a rank is as long as whole 16 bytes.
    missing = -lora_A.shape[1] % (16 // dtype.itemsize)
    if missing:
        lora_A = pad(lora_A, (0, 0, 0, missing))
        lora_B = pad(lora_B.mT, (0, missing)).mT
    return ExpertSide(lora_A, lora_B, projection.row_scale())


def initial_A(
    shape: tuple[int, int], init: Literal["kaiming", "gaussian"], seed: int, name: str
) -> Tensor:
    """Draw an A, [R, I], by a configuration's `init`; see `initial_weight`."""
    std = 1 / shape[0] if init == "gaussian" else None
    return initial_weight(shape, seed, name, std)


def initial_weight(
    shape: tuple[int, int], seed: int, name: str, std: float | None = None
) -> Tensor:
    """Draw [out, in] by a seed and a tensor's name: normal, or as linear layers begin (None)."""
    # On the CPU in float32 whatever trains, so that a job starts alike on every device.
    initial = torch.empty(shape, dtype=torch.float32)
    generator = generator_for(seed, name)
    if std is not None:
        return initial.normal_(std=std, generator=generator)
    bound = 1 / math.sqrt(shape[1])  # Kaiming uniform with a = sqrt(5)
    return initial.uniform_(-bound, bound, generator=generator)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Make a CPU generator that depends on the seed and the name alone."""
    # Not Python's hash, which differs from process to process.
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
