"""The names of an adapter's tensors, independent of any layout on disk.

    layers.{L}.{block}.{projection}.{part}                   one for all
    layers.{L}.{block}.{projection}.experts.{e}.{part}       one for each expert
    layers.{L}.{block}.{part}                                of a whole block, as its router
    shared.{part}                                            one for all layers
    experts.{e}.{name}                                       any of these, of an adapter within it

A block is a path in a layer, `mlp` or `mlp.experts` for instance. A part is `lora_A` (R, I),
`lora_B` (O, R), `magnitude` (O,), each with an axis of the base model's experts in front where
these are stacked, `router` (E, I), or what else a method
has: one word, and never `weight` or `bias`, which are parameters of a module that is trained whole.
Modules of the base model that an adapter has as its own are in extra_modules.py.

Axes: E experts, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from loraloom.errors import AdapterError

_PART = r"(?P<part>(?!weight$|bias$)\w+)"
_PATTERN = re.compile(
    r"layers\.(?P<layer>\d{1,5})\.(?P<block>\w+(?:\.\w+){0,2}?)\."
    # what is called expert or experts is a block, and a number that follows is a LoRA expert's
    rf"(?:(?!\w*experts?\.)(?P<projection>[^\W\d]\w*)\.(?:experts\.(?P<expert>\d{{1,5}})\.)?)?{_PART}",
    re.ASCII,
)
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
    part: str  # `lora_A`, `lora_B`, `magnitude`, `router` …
    projection: str | None = None  # None for what is a whole block's
    expert: int | None = None

    @classmethod
    def parse(cls, name: str) -> TensorKey | None:
        """Read a name; None if it isn't one of a layer's tensors."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            return None
        expert = None if match["expert"] is None else int(match["expert"])
        return cls(int(match["layer"]), match["block"], match["part"], match["projection"], expert)

    @property
    def path(self) -> str:
        """The projection in its block, or what the block has: `mlp.up_proj`, `mlp.router`."""
        return f"{self.block}.{self.projection or self.part}"

    @property
    def place(self) -> str:
        """The projection's key, `layers.{L}.{block}.{projection}`."""
        return f"layers.{self.layer}.{self.path}"

    def __str__(self) -> str:
        expert = None if self.expert is None else f"experts.{self.expert}"
        names = (f"layers.{self.layer}", self.block, self.projection, expert, self.part)
        return ".".join(name for name in names if name is not None)


def check_can_be_saved(module: nn.Module, tensors: Iterable[Tensor], title: str) -> None:
    """Raise an AdapterError if a method's files would lack some of its trained parameters."""
    num_saved = defaultdict[int, int](int)  # numbers, by their storage
    for tensor in tensors:
        num_saved[tensor.untyped_storage().data_ptr()] += tensor.numel()
    for name, weight in module.named_parameters():
        storage = weight.untyped_storage().data_ptr()
        if weight.requires_grad and num_saved[storage] < weight.numel():
            raise AdapterError(
                f"tensors() of {title} must yield views of all trained parameters, got none or a "
                f"part of {name}; yield or freeze {name}"
            )


def within(name: str) -> str:
    """Leave out of which adapter within another one a tensor is."""
    return name[match.end() :] if (match := _WITHIN.match(name)) else name
