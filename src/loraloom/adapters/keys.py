"""The names of an adapter's tensors, independent of any layout on disk.

    layers.{L}.{block}.{projection}.{part}                   one for all
    layers.{L}.{block}.{projection}.experts.{e}.{part}       one for each expert
    layers.{L}.{block}.router                                a router of a whole block
    layers.{L}.{block}.router_bias                           what balances its load
    shared.{part}                                            one for all layers

A part is `lora_A` (R, I), `lora_B` (O, R), `magnitude` (O,), `router` (E, I), or what else a method
has.

Axes: E experts, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo

_PATTERN = re.compile(
    r"layers\.(?P<layer>\d{1,5})\.(?P<block>\w+)\."
    r"(?:(?P<router>router|router_bias)"
    r"|(?P<projection>\w+)\.(?:experts\.(?P<expert>\d{1,5})\.)?(?P<part>(?!weight$|bias$)\w+))",
    re.ASCII,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorKey:
    """One tensor's place in an adapter."""

    layer: int
    block: str
    """The family's own name of the attention or FFN module, `self_attn` or `mlp` for instance."""
    part: str
    """`lora_A`, `lora_B`, `magnitude`, `router` …"""
    projection: str | None = None
    """None for the router of a block, and for its bias."""
    expert: int | None = None

    @classmethod
    def parse(cls, name: str) -> TensorKey | None:
        """Read a name; None if it isn't one of a layer's tensors."""
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

    @property
    def path(self) -> str:
        """The projection in its block, or the block's router: `mlp.up_proj`, `mlp.router`."""
        return f"{self.block}.{self.projection or self.part}"

    def __str__(self) -> str:
        expert = None if self.expert is None else f"experts.{self.expert}"
        names = (f"layers.{self.layer}", self.block, self.projection, expert, self.part)
        return ".".join(name for name in names if name is not None)


def is_meant(target: str, key: str) -> bool:
    """Whether a target names a projection, by the end of `layers.{L}.{block}.{projection}`."""
    return f".{key}".endswith(f".{target}")


def target_projections(
    targets: str | tuple[str, ...], base: BaseInfo, layer: int | None = None
) -> list[str]:
    """Name the projections that `target_modules` means, as `block.projection`, attention first."""
    groups = {
        "attention": [f"{base.attention}.{name}" for name in base.attention_projections],
        "ffn": [f"{base.ffn}.{name}" for name in base.ffn_projections],
    }
    groups["all-linear"] = groups["attention"] + groups["ffn"]
    there = [path for path in groups["all-linear"] if layer is None or base.has(layer, path)]
    if isinstance(targets, str):
        return [path for path in there if path in groups[targets]]
    place = "" if layer is None else f"layers.{layer}."
    return [path for path in there if any(is_meant(target, f"{place}{path}") for target in targets)]


def target_pattern(targets: str | tuple[str, ...], base: BaseInfo) -> str:
    """Name what `target_modules` means by a pattern that matches nothing else in the base model."""
    paths = "|".join(map(re.escape, target_projections(targets, base)))
    return rf"{re.escape(base.layers_path)}\.\d+\.({paths})"
