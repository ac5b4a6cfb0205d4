"""The context of a running forward: everything that wrappers in the base model need to know.

It is made by `Host`, never changed, and found through a context variable, so that threads don't see
each other's, and a bare forward of the base model sees none. Under gradient checkpointing a decoder
layer takes its context along: the backward pass may recompute it in another thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.contract import Adapter
from loraloom.adapters.segment import SampleTokens, SegmentTokens
from loraloom.host.layout import Layout, Segment
from loraloom.host.prepared_weights import (
    ComputeForms,
    ProjectionSite,
    Record,
    recorder_of,
)
from loraloom.host.stacked_forward import StackedForward
from loraloom.ops.dropout import SampleNoise
from loraloom.ops.low_rank import InputGroup, UpProjection
from loraloom.routing.record import LayerRouting, join_routing


class _Product(NamedTuple):
    """A segment's product with a group's A, and what it was made of."""

    group: InputGroup
    low_rank: Tensor
    rows: Tensor
    tokens: SegmentTokens


@dataclass(frozen=True)
class ForwardContext:
    """One forward of a batch through the base model and its adapters."""

    owner: object  # the wiring of the base model
    layout: Layout
    checkpointing: bool = False
    record: Record | None = None  # collects what routers do
    forms: ComputeForms = field(default_factory=ComputeForms)  # made anew, or of prepared weights
    stacked: StackedForward | None = None  # computes small steps of like adapters at once
    # Segments' products with one input, and that input, for the projections that read it.
    _shared: dict[tuple[Any, ...], tuple[Tensor, list[_Product | None]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def adapters(self) -> Iterator[Adapter]:
        return (segment.row[0] for segment in self.layout.segments if segment.row is not None)

    def joined_routing(self) -> dict[str, list[LayerRouting]]:
        """Return what routers did, by adapter, an entry for each router."""
        record = self.record or {}
        return {name: join_routing(entries) for name, entries in record.items() if entries}

    def samples(self) -> dict[str, list[SampleTokens] | None]:
        """Return whose tokens the routing is of, by adapter."""
        record = self.record or {}
        return {
            name: self.layout.sample_tokens(name) for name, routing in record.items() if routing
        }

    def tokens(self, segment: Segment, layer: int, device: torch.device) -> SegmentTokens:
        noise = None
        if segment.spans is not None:
            noise = SampleNoise(segment.spans, segment.num_tokens, layer, device)
        record = None if segment.row is None else recorder_of(self.record, segment.row[0])
        return SegmentTokens(
            layer=layer,
            real=segment.real,
            real_index=segment.real_index,
            noise=noise,
            record=record,
        )

    def updates(
        self, site: ProjectionSite, layout: Layout, hidden_states: Tensor, dtype: torch.dtype
    ) -> Sequence[tuple[Tensor | None, UpProjection | None]]:
        """Return what each segment's B multiplies, [T, S], and its B side; None: not adapted.

        The layout is that of the projection's input.
        """
        key = (site.block, site.group, dtype)
        inputs, products = self._shared.get(key, (None, []))
        if inputs is not hidden_states:
            segments = zip(layout.segments, layout.split(hidden_states), strict=True)
            products = [self._product(site, *segment, dtype) for segment in segments]
            self._shared.clear()
            self._shared[key] = (hidden_states, products)
        updates = []
        for product in products:
            side = None if product is None else product.group.projections.get(site.name)
            if product is None or side is None:
                updates.append((None, None))
            else:
                rank_input = side.rank_input(product.low_rank, product.rows, product.tokens)
                updates.append((rank_input, side))
        return updates

    def _product(
        self, site: ProjectionSite, segment: Segment, rows: Tensor, dtype: torch.dtype
    ) -> _Product | None:
        if segment.row is None:
            return None
        group = self.forms.group(segment.row, site.block, site.group, dtype)
        if group is None:
            return None
        tokens = self.tokens(segment, site.block.layer, rows.device)
        low_rank = segment.row[0].group_low_rank(group, rows, site.site, tokens)
        return _Product(group, low_rank, rows, tokens)

    def recomputing(self) -> ForwardContext:
        """Return the context in which a layer is recomputed: its routing is recorded already."""
        # What is recorded again is dropped, but not left out: autograd wants the same operations.
        return replace(self, record=None if self.record is None else {}, _shared={})


_current: ContextVar[ForwardContext | None] = ContextVar("loraloom_forward", default=None)


def current_forward(owner: object) -> ForwardContext | None:
    forward = _current.get()
    return forward if forward is not None and forward.owner is owner else None


@contextmanager
def running(forward: ForwardContext | None) -> Iterator[None]:
    token = _current.set(forward)
    try:
        yield
    finally:
        _current.reset(token)
        if forward is not None:
            forward._shared.clear()
