"""The names of an adapter's tensors, independent of any layout on disk.

    layers.{L}.{block}.{projection}.lora_A                  (R, I)
    layers.{L}.{block}.{projection}.lora_B                  (O, R)
    layers.{L}.{block}.{projection}.magnitude               (O,)    DoRA
    layers.{L}.{block}.router                               (E, D)  mixture
    layers.{L}.{block}.{projection}.experts.{e}.lora_A ...          mixture, as above

Axes: E experts, D hidden, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from loraloom.config.adapter import LoraConfig, MixLoraConfig
from loraloom.formats.base import BaseInfo

_PATTERN = re.compile(
    r"layers\.(?P<layer>\d+)\.(?P<block>\w+)\."
    r"(?:(?P<router>router)"
    r"|(?P<projection>\w+)\.(?:experts\.(?P<expert>\d+)\.)?(?P<part>lora_A|lora_B|magnitude))"
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorKey:
    """One tensor's place in an adapter."""

    layer: int
    block: str
    """The family's own name of the attention or FFN module, `self_attn` or `mlp` for instance."""
    part: str
    """`lora_A`, `lora_B`, `magnitude` or `router`."""
    projection: str | None = None
    """None for a router, which belongs to its block."""
    expert: int | None = None

    @classmethod
    def parse(cls, name: str) -> TensorKey | None:
        """Read a name; None if it isn't one of ours."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            return None
        expert = match["expert"]
        return cls(
            layer=int(match["layer"]),
            block=match["block"],
            part=match["router"] or match["part"],
            projection=match["projection"],
            expert=None if expert is None else int(expert),
        )

    def __str__(self) -> str:
        expert = None if self.expert is None else f"experts.{self.expert}"
        parts = (f"layers.{self.layer}", self.block, self.projection, expert, self.part)
        return ".".join(part for part in parts if part is not None)


def target_projections(config: LoraConfig, base: BaseInfo) -> list[str]:
    """Name the projections that an adapter changes, as `block.projection`, attention first."""
    groups = {
        "attention": [f"{base.attention}.{name}" for name in base.attention_projections],
        "ffn": [f"{base.ffn}.{name}" for name in base.ffn_projections],
    }
    groups["all-linear"] = groups["attention"] + groups["ffn"]
    targets = config.target_modules
    if isinstance(targets, str):
        return groups[targets]
    return [path for path in groups["all-linear"] if path.rpartition(".")[2] in targets]


def tensor_shapes(config: LoraConfig, base: BaseInfo) -> dict[str, Shape]:
    """Give the name and shape of every tensor that an adapter has on a base model."""
    return {
        str(replace(key, layer=layer)): shape
        for layer in range(base.num_layers)
        for key, shape in _layer_shapes(config, base)
    }


def _layer_shapes(config: LoraConfig, base: BaseInfo) -> Iterator[tuple[TensorKey, Shape]]:
    if isinstance(config, MixLoraConfig):
        yield TensorKey(0, base.ffn, "router"), (config.num_experts, base.hidden_size)
    for path in target_projections(config, base):
        block, _, projection = path.partition(".")
        if isinstance(config, MixLoraConfig) and block == base.ffn:
            for expert in range(config.num_experts):
                place = TensorKey(0, block, "", projection, expert)
                yield from _lora_shapes(place, config.expert_config, base.shapes[path])
        else:
            yield from _lora_shapes(TensorKey(0, block, "", projection), config, base.shapes[path])


def _lora_shapes(
    place: TensorKey, config: LoraConfig, weight_shape: tuple[int, int]
) -> Iterator[tuple[TensorKey, Shape]]:
    out_features, in_features = weight_shape
    yield replace(place, part="lora_A"), (config.rank, in_features)
    yield replace(place, part="lora_B"), (out_features, config.rank)
    if config.weight_decomposition:
        yield replace(place, part="magnitude"), (out_features,)
