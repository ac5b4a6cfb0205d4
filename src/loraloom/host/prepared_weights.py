"""Adapters' weights as forwards compute with them, and plans for small forwards of like adapters.

Axes: B batch, L sequence, T token rows (B·L), N adapters of a cohort, n token rows of each.

A forward of a few tokens without gradients is bound by the count of operations. So the weights of
like adapters lie side by side in a stack, and every product of a cohort is one batched product over
its N adapters. A cohort's rows are gathered as [N, n, ...], shorter adapters padded with a row that
is thrown away. Rows that no cohort has are the base's; nothing of a cohort is ever added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.contract import Adapter, OwnModule
from loraloom.adapters.low_rank import input_group
from loraloom.base.blocks import Block
from loraloom.ops.dropout import Site
from loraloom.ops.expert_weights import stack_alike
from loraloom.ops.low_rank import InputGroup
from loraloom.ops.stacked import stack_inputs
from loraloom.routing.record import LayerRouting

# Above it, blocks of tokens that stay in the processor's cache are faster, as in ops/lean_*.py.
# Most bytes of all slots' hidden states in a forward that is computed by stacks.
MAX_HIDDEN_BYTES = 1 << 20
# Plans that are kept: rows come and go in ever new combinations.
MAX_PLANS = 32

# An adapter, and a factor of what it adds to the base model.
ScaledAdapter = tuple[Adapter, float]
# The adapter of each row of a batch; None is the base model.
ScaledRows = Sequence[ScaledAdapter | None]
# What routers did, by adapter; None where nobody asks.
Record = dict[str, list[LayerRouting]]


class ProjectionSite(NamedTuple):
    """A projection of a block, and the group of those that read the same input."""

    block: Block
    group: tuple[str, ...]
    name: str
    site: Site | str


# Projections of a block that share an input; None for a whole block with a gating.
_Names = tuple[str, ...] | None


def recorder_of(record: Record | None, adapter: Adapter) -> Callable[[LayerRouting], None] | None:
    """Return what takes an adapter's routing."""
    if record is None:
        return None
    return record.setdefault(adapter.name, []).append


def outside_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the tensor's device: it is the base's, adapters choose dtypes."""
    device = like.device.type
    if is_autocast_on(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def is_autocast_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # the meta device has none


class ComputeForms:
    """Forms of the parameters as they are, made anew each time but for those that are kept."""

    def __init__(self, kept: dict[tuple[Any, ...], Any] | None = None, *, keeps_new: bool = False):
        if kept is None:
            kept = {}
        self.kept = kept
        self._keeps_new = keeps_new

    def forget(self, adapter: Adapter) -> None:
        gone = set(adapter.modules())
        for key in list(self.kept):
            # A key begins with an adapter, which has parts, or with a module of its own.
            modules = getattr(key[0], "parts", key[:1])
            if not gone.isdisjoint(modules):
                del self.kept[key]

    def group(
        self, row: ScaledAdapter, block: Block, names: Sequence[str], dtype: torch.dtype
    ) -> InputGroup | None:
        """Return projections of a block that share an input; None if none is adapted."""
        adapter, scale = row
        projections = adapter.weights_on(block)
        modules = [projections[name] for name in names if name in projections]
        if not modules:
            return None
        key = (adapter, scale, block, *names, dtype)
        return self._form(key, lambda: input_group(modules, dtype).scaled(scale))

    def ffn(self, row: ScaledAdapter, block: Block, dtype: torch.dtype) -> Any:
        """Return the weights on an FFN block, `FfnWeights`, or on experts, `ExpertWeights`."""
        adapter, scale = row
        key = (adapter, scale, block, dtype)
        return self._form(key, lambda: adapter.ffn_weights(block, dtype).scaled(scale))

    def own(self, module: OwnModule, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return self._form((module, dtype), lambda: module.compute_form(dtype))

    def _form(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key in self.kept:
            return self.kept[key]
        form = make()
        if self._keeps_new:
            self.kept[key] = form
        return form


class _Stack:
    """Like adapters' weights side by side, made when first asked for."""

    def __init__(
        self, adapters: tuple[ScaledAdapter, ...], dtype: torch.dtype, forms: ComputeForms
    ):
        self.adapters = adapters
        self._dtype = dtype
        self._forms = forms
        self._parts: dict[tuple[Block, _Names], Any] = {}

    def part(self, block: Block, names: _Names) -> Any:
        """Return projections that share an input, or the whole block; None if none is adapted."""
        key = (block, names)
        if key not in self._parts:
            self._parts[key] = self._make(block, names)
        return self._parts[key]

    def _make(self, block: Block, names: _Names) -> Any:
        rows = self.adapters
        if names is None:
            adapters = [adapter for adapter, _ in rows]
            if not adapters[0].adapts(block):
                return None
            weights = [self._forms.ffn(row, block, self._dtype) for row in rows]
            if block.num_experts is not None:
                return stack_alike(weights)
            return adapters[0].stack_ffn(adapters, block, weights)
        forms = [self._forms.group(row, block, names, self._dtype) for row in rows]
        groups = [form for form in forms if form is not None]  # all have one, or none
        return stack_inputs(groups) if groups else None


# Adapters that lie behind one another in a stack.
_Part = tuple[_Stack, slice]


class PreparedWeights:
    """Compute forms of adapters' weights, kept for as long as nobody changes the weights."""

    # One thread at a time uses it: that of a decoding session, or of a `with host.prepared():`.

    def __init__(self) -> None:
        self.forms = ComputeForms(keeps_new=True)
        self._plans: dict[Hashable, StackedPlan | None] = {}
        self._stacks: dict[Hashable, _Stack] = {}

    def plan(
        self, rows: ScaledRows, length: int, dtype: torch.dtype, device: torch.device
    ) -> StackedPlan | None:
        """Plan how to compute a small forward; None: not by stacks."""
        key = (tuple(rows), length, dtype, device)
        if key not in self._plans:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plan = None
            parts = self._parts(rows, length, dtype)
            if parts is not None:
                plan = make_plan(parts, rows, length, device)
            # assigned behind it, as a new stack empties the plans
            self._plans[key] = plan
        return self._plans[key]

    def forget(self, adapter: Adapter) -> None:
        self.forms.forget(adapter)
        self._plans.clear()
        gone = {*adapter.parts}
        for key, stack in list(self._stacks.items()):
            if any(not gone.isdisjoint(member.parts) for member, _ in stack.adapters):
                del self._stacks[key]

    def _parts(self, rows: ScaledRows, length: int, dtype: torch.dtype) -> list[_Part] | None:
        """Find the adapters' parts of stacks; None if some can't be computed by them."""
        present = dict.fromkeys(adapter for adapter in rows if adapter is not None)
        # By name, so that stacks depend on no order of rows; scales of one adapter stay in order.
        adapters = sorted(present, key=lambda scaled: scaled[0].name)
        top_k = max(adapter.config.experts_per_token or 1 for adapter, _ in adapters)
        num_slots = top_k * len(rows) * length
        first, _ = adapters[0]
        hidden_bytes = num_slots * first.widest_input * dtype.itemsize
        if hidden_bytes > MAX_HIDDEN_BYTES:
            return None
        alike: dict[Hashable, list[ScaledAdapter]] = {}
        for adapter, scale in adapters:
            if adapter.adapts_gated_blocks is None:
                return None
            alike.setdefault(adapter.stack_key(), []).append((adapter, scale))
        if None in alike:
            return None
        return [self._take(tuple(adapters), dtype) for adapters in alike.values()]

    def _take(self, adapters: tuple[ScaledAdapter, ...], dtype: torch.dtype) -> _Part:
        """Find a stack with these adapters, all of which are alike, and their part of it."""
        first, _ = adapters[0]
        key = (first.stack_key(), dtype)
        stacked = self._stacks[key].adapters if key in self._stacks else ()
        entries = [stacked.index(adapter) for adapter in adapters if adapter in stacked]
        # Others lie between them: when these are more, they go.
        is_sparse = bool(entries) and max(entries) - min(entries) >= 2 * len(entries)
        # An adapter's record has its scales in the order of the rows.
        if len(entries) < len(adapters) or is_sparse or entries != sorted(entries):
            others: tuple[ScaledAdapter, ...] = ()
            if not is_sparse:
                others = tuple(adapter for adapter in stacked if adapter not in adapters)
            self._plans.clear()
            self._stacks[key] = _Stack(adapters + others, dtype, ComputeForms(self.forms.kept))
            entries = range(len(adapters))
        return self._stacks[key], slice(entries[0], entries[-1] + 1)


def forms_of(prepared: PreparedWeights | None) -> ComputeForms:
    """Return where weights' compute forms come from: made anew, unless they are prepared."""
    if prepared is None or torch.is_grad_enabled():
        return ComputeForms()
    return prepared.forms


@dataclass(frozen=True)
class Cohort:
    """Like adapters of a batch, views of their weights, and where their rows are."""

    stack: _Stack
    entries: slice  # of the stack's adapters
    counts: tuple[int, ...]  # token rows of each; the first and the last have some
    take: Tensor | None = None  # token row of each place of [N, n]; with `put` None: in order
    put: Tensor | None = None  # place of each token row, any at rows that are not the cohort's
    is_outside: Tensor | None = None  # True at rows that are not the cohort's, [T, 1]
    _views: dict[tuple[Block, _Names], Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Token rows of each adapter, padding included: n."""
        return max(self.counts)

    def part(self, block: Block, names: _Names = None) -> Any:
        """Return the adapters' weights, as `_Stack.part` does."""
        key = (block, names)
        if key not in self._views:
            weights = self.stack.part(block, names)
            if weights is not None:
                weights = weights.take(self.entries)
            self._views[key] = weights
        return self._views[key]

    def side_by_side(self, rows: Tensor) -> Tensor:
        """See gathered rows, [N·n, ...], as [N, n, ...]."""
        return rows.view(len(self.counts), -1, rows.shape[-1])

    def tokens_and_entries(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Return the cohort's token rows, None for all in order, and which adapter each is of."""
        counts = torch.tensor(self.counts)
        entries = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        if self.take is None:
            return None, entries
        is_real = torch.arange(self.width) < counts[:, None]
        return self.take[is_real.flatten().to(device)], entries

    def scatter(self, values: Tensor, blank: float = 0.0) -> Tensor:
        """Go from [N, n, O] to [T, O], with `blank` at rows that are not the cohort's."""
        values = values.flatten(0, 1)
        if self.put is None:
            return values
        rows = values.index_select(0, self.put)
        if self.is_outside is None:
            return rows
        return rows.masked_fill_(self.is_outside, blank)


@dataclass(frozen=True)
class StackedPlan:
    """The cohorts of a batch, and how their FFN rows lie behind one another.

    Behind them are rows that no cohort's FFN has. Both orders are None for one cohort of all rows.
    """

    cohorts: tuple[Cohort, ...]  # those that adapt FFN blocks too come first
    num_in_ffn: int
    device: torch.device
    ffn_take: Tensor | None = None  # token row of each place
    ffn_put: Tensor | None = None  # place of each token row


def make_plan(
    parts: Sequence[_Part], rows: ScaledRows, length: int, device: torch.device
) -> StackedPlan:
    num_tokens = len(rows) * length
    ffn_put = torch.zeros(num_tokens).long()
    is_left = torch.ones(num_tokens).bool()
    cohorts: list[Cohort] = []
    orders: list[Tensor] = []

    for stack, entries in sorted(parts, key=_adapts_ffn, reverse=True):
        adapters = stack.adapters[entries]
        owners = [adapters.index(row) if row in adapters else -1 for row in rows]
        owner = torch.tensor(owners).repeat_interleave(length)  # (T,)
        counts, take, put = _gathering(owner, len(adapters))
        is_inside = owner >= 0
        if _adapts_ffn((stack, entries)):
            num_before = sum(map(len, orders))
            ffn_put[is_inside] = put[is_inside] + num_before
            orders.append(take)
            is_left &= ~is_inside
        if counts == (num_tokens,):
            cohorts.append(Cohort(stack, entries, counts))
            continue
        is_outside = None
        if not is_inside.all():
            is_outside = ~is_inside[:, None].to(device)
        take = take.to(device)
        put = put.to(device)
        cohorts.append(Cohort(stack, entries, counts, take, put, is_outside))
    if orders and cohorts[0].put is None:
        return StackedPlan(tuple(cohorts), 1, device)
    left = is_left.nonzero().flatten()
    num_before = sum(map(len, orders))
    ffn_put[left] = num_before + torch.arange(len(left))
    ffn_take = torch.cat([*orders, left]).to(device)
    return StackedPlan(tuple(cohorts), len(orders), device, ffn_take, ffn_put.to(device))


def _adapts_ffn(adapters: _Part) -> bool:
    stack, entries = adapters
    first, _ = stack.adapters[entries][0]
    return bool(first.adapts_gated_blocks)


def _gathering(owner: Tensor, num_adapters: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Return `counts`, `take` and `put` of a cohort, from each token's adapter in it or -1."""
    tokens_by_adapter = [(owner == number).nonzero().flatten() for number in range(num_adapters)]
    counts = tuple(map(len, tokens_by_adapter))
    width = max(counts)
    put = torch.zeros(len(owner)).long()
    take = torch.zeros(num_adapters, width).long()
    for number, tokens in enumerate(tokens_by_adapter):
        count = len(tokens)
        if count:
            take[number] = tokens[0]  # padding
        take[number, :count] = tokens
        put[tokens] = number * width + torch.arange(count)
    return counts, take.flatten(), put
