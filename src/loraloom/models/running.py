"""The running forward: its layout, its adapters, and the record of its routing.

Wrappers find it in a slot that the host shares with them. Under gradient checkpointing the slot is
filled again, with the same forward, while a layer is recomputed in the backward pass (which may
run in another thread); the record is closed by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter
from loraloom.models.layout import Layout
from loraloom.models.stacking import StackedForward, StackedPlan
from loraloom.ops.dropout import Site
from loraloom.ops.low_rank import InputGroup
from loraloom.routing.record import LayerRouting

AttentionPart = tuple[InputGroup, Tensor]


class RunningForward:
    """One forward of a batch through the base model and its adapters.

    Args:
        layout: Which rows belong to which adapter.
        adapters: The host's.
        plan: How to compute it by cohorts, if it is a small forward without gradients.
        recording: Keep a record of the routing.
    """

    def __init__(
        self,
        layout: Layout,
        adapters: Mapping[str, Adapter],
        plan: StackedPlan | None = None,
        *,
        recording: bool = True,
    ):
        self.layout = layout
        self.stacked = None if plan is None else StackedForward(plan)
        names = [segment.adapter_name for segment in layout.segments]
        self.adapters = [None if name is None else adapters[name] for name in names]
        self.has_adapters = any(adapter is not None for adapter in self.adapters)
        self.routing: dict[str, list[LayerRouting]] = {}
        self.recording = recording
        self._shared: tuple[Tensor, tuple, list[AttentionPart | None]] | None = None

    def record(self, adapter_name: str, routing: LayerRouting) -> None:
        """Keep a layer's routing, unless the layer is being recomputed."""
        if self.recording:
            self.routing.setdefault(adapter_name, []).append(routing)

    def attention_parts(
        self, layer: int, names: Sequence[str], site: Site, hidden_states: Tensor, dtype
    ) -> list[AttentionPart | None]:
        """Return each segment's share of projections with one input, computing its A product once.

        The last result is kept, and used again for the same input tensor.
        """
        key = (layer, site, dtype)
        if self._shared is not None:
            known_states, known_key, known_parts = self._shared
            if known_states is hidden_states and known_key == key:
                return known_parts
        parts: list[AttentionPart | None] = []
        rows = self.layout.split(hidden_states)
        for segment, adapter, tokens in zip(self.layout.segments, self.adapters, rows, strict=True):
            group = None if adapter is None else adapter.attention_group(layer, names, dtype)
            if adapter is None or group is None:
                parts.append(None)
                continue
            told = segment.at_layer(layer, hidden_states.device)
            low_rank = adapter.attention_low_rank(layer, group, tokens, site, told)
            parts.append((group, low_rank))
        self._shared = (hidden_states, key, parts)
        return parts

    def forget_shared(self) -> None:
        """Drop the kept A products."""
        self._shared = None


class RunningSlot:
    """Where wrappers look for the running forward."""

    def __init__(self):
        self.current: RunningForward | None = None

    @contextmanager
    def running(self, forward: RunningForward) -> Iterator[RunningForward]:
        """Run a forward; afterwards its record is closed."""
        with self._filled(forward):
            yield forward
        forward.recording = False

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed layer's forward and of its recomputation."""
        forward = self.current
        return nullcontext(), nullcontext() if forward is None else _Refilled(self, forward)

    @contextmanager
    def _filled(self, forward: RunningForward) -> Iterator[None]:
        before, self.current = self.current, forward
        try:
            yield
        finally:
            self.current = before
            forward.forget_shared()


class _Refilled(AbstractContextManager[None]):
    """Fills a slot while a layer is recomputed; a graph that is kept is gone through again."""

    def __init__(self, slot: RunningSlot, forward: RunningForward):
        self._slot = slot
        self._forward = forward
        self._before: RunningForward | None = None

    def __enter__(self) -> None:
        self._before, self._slot.current = self._slot.current, self._forward

    def __exit__(self, *error: object) -> None:
        self._slot.current = self._before
        self._forward.forget_shared()


def expand_adapters(adapters: Sequence[str | None], batch_size: int) -> Sequence[str | None]:
    """Repeat each row's adapter for its beams or returned sequences."""
    copies = batch_size // len(adapters)
    return [name for name in adapters for _ in range(copies)]


def query_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return the part of a padding mask that belongs to this forward's tokens, [B, L]."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:]
