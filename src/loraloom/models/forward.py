"""The context of a running forward: everything that wrappers in the base model need to know.

It is made at the door (`Host`), never changed, and found through a context variable, so that
threads don't see each other's, and a bare forward of the base model sees none. Under gradient
checkpointing a decoder layer takes its context along: the backward pass may recompute it in
another thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.base import SegmentTokens
from loraloom.adapters.method import Adapter
from loraloom.models.layout import Layout
from loraloom.models.stacking import StackedForward, StackedPlan, plan_stacked
from loraloom.models.stacks import ComputeForms, ScaledAdapter, Stacks
from loraloom.ops.dropout import Site
from loraloom.ops.low_rank import InputGroup, UpProjection
from loraloom.routing.record import LayerRouting

Record = dict[str, list[LayerRouting]]
"""What routers did, by adapter."""


KEPT_PLANS = 8
"""Plans that are kept: rows come and go in ever new combinations."""


class PreparedWeights:
    """Compute forms of adapters' weights, kept for as long as nobody changes the weights.

    One thread at a time uses it: that of a decoding session, or of a `with host.prepared():`.

    Attributes:
        forms: Of each adapter by itself.
    """

    def __init__(self) -> None:
        self.forms = ComputeForms(keeps=True)
        self._plans: OrderedDict[Hashable, StackedPlan | None] = OrderedDict()
        self._stacks = Stacks(self.forms.passing(), on_change=self._plans.clear)

    def plan(
        self,
        rows: tuple[ScaledAdapter | None, ...],
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StackedPlan | None:
        """Return what `plan_stacked` does; the latest results are kept."""
        key = (rows, length, dtype, device)
        if key not in self._plans:
            plan = plan_stacked(self._stacks.take, rows, length, dtype, device)
            self._plans[key] = plan
        self._plans.move_to_end(key)
        if len(self._plans) > KEPT_PLANS:
            self._plans.popitem(last=False)
        return self._plans[key]

    def forget(self, adapter: Adapter) -> None:
        """Let what was made of an adapter's weights go, as they have changed or it has gone."""
        self.forms.forget(adapter)
        self._stacks.forget(adapter)


def forms_of(prepared: PreparedWeights | None) -> ComputeForms:
    """Return where weights' compute forms come from: made anew, unless they are prepared."""
    if prepared is None or torch.is_grad_enabled():
        return ComputeForms()
    return prepared.forms


@dataclass(frozen=True)
class AttentionPart:
    """A segment's share of attention projections that read the same input.

    Args:
        group: Their weights.
        hidden_states: Their input, [T, I].
        tokens: Describes its rows.
        low_rank: The product with all their A, [T, P].
    """

    group: InputGroup
    hidden_states: Tensor
    tokens: SegmentTokens
    low_rank: Tensor

    def update(self, name: str) -> tuple[Tensor | None, UpProjection | None]:
        """Return what a projection's B multiplies, [T, S], and its B side; None if not adapted."""
        side = self.group.projections.get(name)
        if side is None:
            return None, None
        return side.rank_input(self.low_rank, self.hidden_states, self.tokens), side


@dataclass(frozen=True)
class ForwardContext:
    """One forward of a batch through the base model and its adapters.

    Args:
        owner: The wiring of the base model that it runs in.
        layout: Which rows belong to which adapter.
        adapters: Each segment's; None is the base model.
        training: Dropout and jitter are on.
        checkpointing: Decoder layers are recomputed in the backward pass.
        record: Takes what routers do; None where nobody asks.
        prepared: Compute forms of the weights; None: they are made from the parameters as they are.
        stacked: How small steps are computed for like adapters at once.
    """

    owner: object
    layout: Layout
    adapters: tuple[Adapter | None, ...]
    training: bool = False
    checkpointing: bool = False
    record: Record | None = None
    prepared: PreparedWeights | None = None
    stacked: StackedForward | None = None
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)
    """The last A product of attention, for the projections that read the same input."""

    @property
    def has_adapters(self) -> bool:
        """Whether some rows are not the base model's."""
        return any(adapter is not None for adapter in self.adapters)

    def adapts_ffn(self, layer: int) -> bool:
        """Whether some adapter has weights in this layer's FFN block."""
        return any(adapter is not None and adapter.adapts_ffn(layer) for adapter in self.adapters)

    def has_own(self, path: str) -> bool:
        """Whether some adapter has a module of its own in place of one of the base model."""
        return any(a is not None and a.own_at(path) is not None for a in self.adapters)

    @property
    def forms(self) -> ComputeForms:
        """Where weights' compute forms come from."""
        return forms_of(self.prepared)

    def recorder(self, adapter: Adapter) -> Callable[[LayerRouting], None] | None:
        """Return what takes an adapter's routing; None where nobody asks."""
        if self.record is None:
            return None
        return self.record.setdefault(adapter.name, []).append

    def tokens(
        self, adapter: Adapter, index: int, layer: int, device: torch.device
    ) -> SegmentTokens:
        """Describe a segment's tokens in a layer to their adapter."""
        return self.layout.segments[index].at_layer(layer, device, self.recorder(adapter))

    def attention_parts(
        self, layer: int, names: Sequence[str], site: Site, hidden_states: Tensor, dtype
    ) -> Sequence[AttentionPart | None]:
        """Return each segment's share of projections with one input, computing its A product once.

        The last result is kept, and used again for the same input tensor.
        """
        key = (layer, site, dtype)
        known = self._shared.get("attention")
        if known is not None and known[0] is hidden_states and known[1] == key:
            return known[2]
        rows = self.layout.split(hidden_states)
        parts = [
            None
            if adapter is None
            else self._attention_part(adapter, index, layer, names, site, tokens, dtype)
            for index, (adapter, tokens) in enumerate(zip(self.adapters, rows, strict=True))
        ]
        self._shared["attention"] = (hidden_states, key, parts)
        return parts

    def recomputing(self) -> ForwardContext:
        """Return the context in which a layer is recomputed: its routing is recorded already.

        What is recorded again is thrown away, but not left out: autograd wants the same operations.
        """
        return replace(self, record=None if self.record is None else {}, _shared={})

    def close(self) -> None:
        """Drop the kept A products."""
        self._shared.clear()

    def _attention_part(
        self,
        adapter: Adapter,
        index: int,
        layer: int,
        names: Sequence[str],
        site: Site,
        hidden_states: Tensor,
        dtype: torch.dtype,
    ) -> AttentionPart | None:
        row = (adapter, self.layout.segments[index].scale)
        group = self.forms.attention(row, layer, names, dtype)
        if group is None:
            return None
        tokens = self.tokens(adapter, index, layer, hidden_states.device)
        low_rank = adapter.attention_low_rank(group, hidden_states, site, tokens)
        return AttentionPart(group, hidden_states, tokens, low_rank)


_current: ContextVar[ForwardContext | None] = ContextVar("loraloom_forward", default=None)


def current_forward(owner: object) -> ForwardContext | None:
    """Return the forward that runs in this thread through a wiring; None if there is none."""
    forward = _current.get()
    return forward if forward is not None and forward.owner is owner else None


@contextmanager
def running(forward: ForwardContext | None) -> Iterator[None]:
    """Make a forward the current one."""
    token = _current.set(forward)
    try:
        yield
    finally:
        _current.reset(token)
        if forward is not None:
            forward.close()


def checkpoint_contexts(
    forward: ForwardContext,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed layer's forward and of its recomputation."""
    return nullcontext(), _Recomputation(forward)


class _Recomputation(AbstractContextManager[None]):
    """Enters a forward again while a layer is recomputed; a graph that is kept may do so often."""

    def __init__(self, forward: ForwardContext):
        self._forward = forward
        self._entered: list[Any] = []

    def __enter__(self) -> None:
        entered = running(self._forward.recomputing())
        entered.__enter__()
        self._entered.append(entered)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def query_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return the part of a padding mask that belongs to this forward's tokens, [B, L]."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:]


def segment_adapters(layout: Layout, adapters: Mapping[str, Adapter]) -> tuple[Adapter | None, ...]:
    """Look each segment's adapter up."""
    names = [segment.adapter_name for segment in layout.segments]
    return tuple(None if name is None else adapters[name] for name in names)
