"""The names of an adapter's tensors, independent of any layout on disk.

    layers.{L}.{block}.{projection}.{part}                   one for all
    layers.{L}.{block}.{projection}.experts.{e}.{part}       one for each expert
    layers.{L}.{block}.{part}                                of a whole block, as its router
    shared.{part}                                            one for all layers
    experts.{e}.{name}                                       any of these, of an adapter within it

A part is `lora_A` (R, I), `lora_B` (O, R), `magnitude` (O,), `router` (E, I), or what else a method
has: one word, and never `weight` or `bias`, which are parameters of a module that is trained whole.
Modules of the base model that an adapter has as its own are in own.py.

Axes: E experts, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor, nn

from loraloom.errors import shown

_PART = r"(?P<part>(?!weight$|bias$)\w+)"
_PATTERN = re.compile(
    r"layers\.(?P<layer>\d{1,5})\.(?P<block>\w+)\."
    rf"(?:(?P<projection>\w+)\.(?:experts\.(?P<expert>\d{{1,5}})\.)?)?{_PART}",
    re.ASCII,
)
_SHARED = re.compile(rf"shared\.{_PART}", re.ASCII)
_WITHIN = re.compile(r"experts\.\d{1,5}\.", re.ASCII)

Shape = tuple[int, ...]


class Weights(nn.Module, ABC):
    """Trained weights that know their names."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor under its name, as a view of the parameters."""


@dataclass(frozen=True)
class TensorKey:
    """One tensor's place in an adapter."""

    layer: int
    block: str
    """The family's own name of the attention or FFN module, `self_attn` or `mlp` for instance."""
    part: str
    """`lora_A`, `lora_B`, `magnitude`, `router` …"""
    projection: str | None = None
    """None for what is a whole block's."""
    expert: int | None = None

    @classmethod
    def parse(cls, name: str) -> TensorKey | None:
        """Read a name; None if it isn't one of a layer's tensors."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            return None
        expert = None if match["expert"] is None else int(match["expert"])
        names = (match["block"], match["part"], match["projection"])
        return cls(int(match["layer"]), *names, expert)

    @property
    def path(self) -> str:
        """The projection in its block, or what the block has: `mlp.up_proj`, `mlp.router`."""
        return f"{self.block}.{self.projection or self.part}"

    def __str__(self) -> str:
        expert = None if self.expert is None else f"experts.{self.expert}"
        names = (f"layers.{self.layer}", self.block, self.projection, expert, self.part)
        return ".".join(name for name in names if name is not None)


def can_be_saved(name: str) -> bool:
    """Whether files can hold a method's tensor under this name, and it is read back from them."""
    return bool(TensorKey.parse(within(name)) or _SHARED.fullmatch(within(name)))


def within(name: str) -> str:
    """Leave out of which adapter within another one a tensor is."""
    return name[match.end() :] if (match := _WITHIN.match(name)) else name


def is_meant(target: str, key: str) -> bool:
    """Whether a target names a projection, by the end of `layers.{L}.{block}.{projection}`."""
    return f".{key}".endswith(f".{target}")


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
        matches(pattern, "")  # it stands in the midst of another one there, without flags
    except re.error as error:
        raise ValueError(f"{shown(pattern)} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a module's name, at a dot or as a whole.

    Source: peft 0.21.2, `peft/utils/other.py` (`get_pattern_key`).
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
