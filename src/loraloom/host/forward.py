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
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.contract import Adapter
from loraloom.adapters.segment import SegmentTokens
from loraloom.host.layout import Layout, Segment
from loraloom.host.prepared_weights import (
    ComputeForms,
    ProjectionSite,
    Record,
    StackedForward,
    recorder_of,
)
from loraloom.ops.dropout import SampleNoise
from loraloom.ops.low_rank import UpProjection


@dataclass(frozen=True)
class ForwardContext:
    """One forward of a batch through the base model and its adapters."""

    owner: object  # the wiring of the base model
    layout: Layout
    checkpointing: bool = False
    record: Record | None = None  # collects what routers do
    forms: ComputeForms = field(default_factory=ComputeForms)  # made anew, or of prepared weights
    stacked: StackedForward | None = None  # computes small steps of like adapters at once
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)
    """The last A product of a group, for the projections that read the same input."""

    @property
    def adapters(self) -> Iterator[Adapter]:
        return (segment.row[0] for segment in self.layout.segments if segment.row is not None)

    def tokens(self, segment: Segment, layer: int, device: torch.device) -> SegmentTokens:
        spans = segment.spans
        noise = None if spans is None else SampleNoise(spans, segment.num_tokens, layer, device)
        record = None if segment.row is None else recorder_of(self.record, segment.row[0])
        real = (segment.real, segment.real_index)
        return SegmentTokens(layer, *real, noise, record, segment.row_length)

    def updates(
        self, site: ProjectionSite, hidden_states: Tensor, dtype: torch.dtype
    ) -> Sequence[tuple[Tensor | None, UpProjection | None]]:
        """Return what each segment's B multiplies, [T, S], and its B side; None: not adapted."""
        key = (site.block, site.group, dtype)
        shared = self._shared.get("group")
        if shared is None or shared[0] is not hidden_states or shared[1] != key:
            segments = zip(self.layout.segments, self.layout.split(hidden_states), strict=True)
            products = [self._product(site, *segment, dtype) for segment in segments]
            shared = self._shared["group"] = (hidden_states, key, products)
        updates = []
        for group, *inputs in shared[2]:
            side = None if group is None else group.projections.get(site.name)
            updates.append((None, None) if side is None else (side.rank_input(*inputs), side))
        return updates

    def _product(
        self, site: ProjectionSite, segment: Segment, rows: Tensor, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """Return a segment's weights, its product with A, its input and its tokens."""
        if segment.row is None:
            return (None,)
        group = self.forms.group(segment.row, site.block, site.group, dtype)
        if group is None:
            return (None,)
        tokens = self.tokens(segment, site.block.layer, rows.device)
        low_rank = segment.row[0].group_low_rank(group, rows, site.site, tokens)
        return group, low_rank, rows, tokens

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
