"""Adapters' weights as forwards compute with them, and small forwards of many like adapters.

Axes: B batch, L sequence, T token rows (B·L), N adapters of a cohort, n token rows of each.

A forward of a few tokens without gradients is bound by the count of operations. So the weights of
like adapters lie side by side in a stack, and every product of a cohort is one batched product over
its N adapters. A cohort's rows are gathered as [N, n, ...], shorter adapters padded with a row that
is thrown away. Rows that no cohort has are the base's; nothing of a cohort is ever added to them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Adapter, OwnModule
from loraloom.adapters.low_rank import input_group
from loraloom.adapters.segment import SegmentTokens
from loraloom.base.blocks import Block
from loraloom.ops.dropout import Site
from loraloom.ops.expert_ffn import FfnWeights
from loraloom.ops.expert_rows import ExpertUpdate
from loraloom.ops.expert_weights import ExpertWeights, stack_experts
from loraloom.ops.low_rank import InputGroup, decompose
from loraloom.ops.stacked import StackedInput, stack_inputs
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
    return None if record is None else record.setdefault(adapter.name, []).append


def outside_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the tensor's device: it is the base's, adapters choose dtypes."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if is_autocast_on(device) else nullcontext()


def is_autocast_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # the meta device has none


class ComputeForms:
    """Forms of the parameters as they are, made anew each time but for those that are kept."""

    def __init__(self, kept: dict[tuple[Any, ...], Any] | None = None, *, keeps_new: bool = False):
        self.kept = {} if kept is None else kept
        self._keeps_new = keeps_new

    def forget(self, adapter: Adapter) -> None:
        gone = set(adapter.modules())
        # A key begins with an adapter, which has parts, or with a module of its own.
        owned = [(key, getattr(key[0], "parts", key[:1])) for key in self.kept]
        for key in [key for key, parts in owned if not gone.isdisjoint(parts)]:
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

    def ffn(self, row: ScaledAdapter, block: Block, dtype: torch.dtype) -> FfnWeights:
        adapter, scale = row
        key = (adapter, scale, block, dtype)
        return self._form(key, lambda: adapter.ffn_weights(block, dtype).scaled(scale))

    def experts(self, row: ScaledAdapter, block: Block, dtype: torch.dtype) -> ExpertWeights:
        adapter, scale = row
        key = (adapter, scale, block, dtype)
        return self._form(key, lambda: adapter.ffn_weights(block, dtype).scaled(scale))

    def own(self, own: OwnModule, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return self._form((own, dtype), lambda: own.compute_form(dtype))

    def _form(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key in self.kept:
            return self.kept[key]
        form = make()
        if self._keeps_new:
            self.kept[key] = form
        return form


class _Stack:
    """Like adapters' weights side by side, made when first asked for; adapters come and go."""

    def __init__(self, dtype: torch.dtype, forms: ComputeForms):
        self.adapters: tuple[ScaledAdapter, ...] = ()
        self._dtype = dtype
        self._forms = forms
        self._parts: dict[tuple[Block, _Names], Any] = {}

    def keep(self, entries: Sequence[int]) -> None:
        """Drop all other adapters, and bring these into this order."""
        self.adapters = tuple(self.adapters[entry] for entry in entries)
        parts = self._parts if entries else {}
        self._parts = {key: part and part.take(entries) for key, part in parts.items()}

    def add(self, adapters: tuple[ScaledAdapter, ...]) -> None:
        self.adapters += adapters
        for key, part in self._parts.items():
            more = self._make(adapters, *key)
            self._parts[key] = part and more and part.followed_by(more)

    def part(self, block: Block, names: _Names) -> Any:
        """Return projections that share an input, or the whole block; None if none is adapted."""
        key = (block, names)
        if key not in self._parts:
            self._parts[key] = self._make(self.adapters, *key)
        return self._parts[key]

    def _make(self, rows: Sequence[ScaledAdapter], block: Block, names: _Names) -> Any:
        if names is None:
            adapters = [adapter for adapter, _ in rows]
            if not adapters[0].adapts(block):
                return None
            if block.num_experts is not None:
                return stack_experts([self._forms.experts(row, block, self._dtype) for row in rows])
            weights = [self._forms.ffn(row, block, self._dtype) for row in rows]
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
            parts = self._parts(rows, length, dtype)
            # assigned behind it, as a change of a stack empties the plans
            self._plans[key] = None if parts is None else make_plan(parts, rows, length, device)
        return self._plans[key]

    def forget(self, adapter: Adapter) -> None:
        self.forms.forget(adapter)
        self._plans.clear()
        gone = {*adapter.parts}
        for stack in self._stacks.values():
            held = enumerate(stack.adapters)
            others = [place for place, one in held if gone.isdisjoint(one[0].parts)]
            if len(others) < len(stack.adapters):
                stack.keep(others)

    def _parts(self, rows: ScaledRows, length: int, dtype: torch.dtype) -> list[_Part] | None:
        """Find the adapters' parts of stacks; None if some can't be computed by them."""
        present = dict.fromkeys(adapter for adapter in rows if adapter is not None)
        # By name, so that stacks depend on no order of rows; scales of one adapter stay in order.
        adapters = sorted(present, key=lambda one: one[0].name)
        slots = max(adapter.config.experts_per_token or 1 for adapter, _ in adapters)
        width = adapters[0][0].widest_input
        if slots * len(rows) * length * width * dtype.itemsize > MAX_HIDDEN_BYTES:
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
        key = (adapters[0][0].stack_key(), dtype)
        # popped, so that what fails half-way is gone
        stack = self._stacks.pop(key, None) or _Stack(dtype, ComputeForms(self.forms.kept))
        missing = tuple(adapter for adapter in adapters if adapter not in stack.adapters)
        if missing:
            stack.add(missing)
        places = [stack.adapters.index(adapter) for adapter in adapters]
        # Others lie between them: when these are more, they go.
        is_sparse = max(places) - min(places) >= 2 * len(places)
        # An adapter's record has its scales in the order of the rows.
        if missing or is_sparse or places != sorted(places):
            self._plans.clear()
            others = [n for n in range(len(stack.adapters)) if n not in places]
            stack.keep(places if is_sparse else [*places, *others])
            places = range(len(places))
        self._stacks[key] = stack
        return stack, slice(min(places), max(places) + 1)


def forms_of(prepared: PreparedWeights | None) -> ComputeForms:
    """Return where weights' compute forms come from: made anew, unless they are prepared."""
    return ComputeForms() if prepared is None or torch.is_grad_enabled() else prepared.forms


@dataclass(frozen=True)
class Cohort:
    """Like adapters of a batch, views of their weights, and where their rows are."""

    stack: _Stack
    entries: slice  # of the stack's adapters
    counts: tuple[int, ...]  # token rows of each; the first and the last have some
    take: Tensor | None = None  # token row of each place of [N, n]; with `put` None: in order
    put: Tensor | None = None  # place of each token row, any at rows that are not the cohort's
    others: Tensor | None = None  # True at rows that are not the cohort's, [T, 1]
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
            self._views[key] = None if weights is None else weights.take(self.entries)
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
        return rows if self.others is None else rows.masked_fill_(self.others, blank)


@dataclass(frozen=True)
class StackedPlan:
    """The cohorts of a batch, and how their FFN rows lie behind one another.

    Behind them are rows that no cohort's FFN has. Both orders are None for one cohort of all rows.
    """

    cohorts: tuple[Cohort, ...]  # those that adapt FFN blocks too come first
    num_in_ffn: int
    device: torch.device
    row_length: int
    ffn_take: Tensor | None = None  # token row of each place
    ffn_put: Tensor | None = None  # place of each token row


def make_plan(
    parts: Sequence[_Part], rows: ScaledRows, length: int, device: torch.device
) -> StackedPlan:
    num_tokens = len(rows) * length
    ffn_put, is_left = torch.zeros(num_tokens).long(), torch.ones(num_tokens).bool()
    cohorts: list[Cohort] = []
    orders: list[Tensor] = []

    def adapts_ffn(part: _Part) -> bool:
        stack, entries = part
        return bool(stack.adapters[entries][0][0].adapts_gated_blocks)

    for stack, entries in sorted(parts, key=adapts_ffn, reverse=True):
        adapters = stack.adapters[entries]
        owners = [adapters.index(row) if row in adapters else -1 for row in rows]
        owner = torch.tensor(owners).repeat_interleave(length)  # (T,)
        places = [(owner == number).nonzero().flatten() for number in range(len(adapters))]
        counts = tuple(map(len, places))
        width, put = max(counts), torch.zeros(num_tokens).long()
        take = torch.zeros(len(adapters), width).long()
        for number, place in enumerate(places):
            take[number] = place[0] if len(place) else 0  # padding
            take[number, : len(place)] = place
            put[place] = number * width + torch.arange(len(place))
        is_own, take = owner >= 0, take.flatten()
        if adapts_ffn((stack, entries)):
            ffn_put[is_own] = put[is_own] + sum(map(len, orders))
            orders.append(take)
            is_left &= ~is_own
        if counts == (num_tokens,):
            cohorts.append(Cohort(stack, entries, counts))
            continue
        others = None if bool(is_own.all()) else ~is_own[:, None].to(device)
        cohorts.append(Cohort(stack, entries, counts, take.to(device), put.to(device), others))
    if orders and cohorts[0].put is None:
        return StackedPlan(tuple(cohorts), 1, device, length)
    ffn_put[is_left] = torch.arange(int(is_left.sum())) + sum(map(len, orders))
    ffn_take = torch.cat([*orders, is_left.nonzero().flatten()]).to(device)
    return StackedPlan(tuple(cohorts), len(orders), device, length, ffn_take, ffn_put.to(device))


class StackedForward:
    """A forward whose adapters are computed by cohorts."""

    def __init__(self, plan: StackedPlan, record: Record | None):
        self._plan = plan
        self._record = record
        self._shared: tuple[Any, ...] = (None,)

    def project(
        self, site: ProjectionSite, hidden_states: Tensor, output: Tensor, linear: nn.Module
    ) -> Tensor:
        """Adapt a projection's output, [B, L, O], in place where that is possible."""
        rows = output.view(-1, output.shape[-1])
        updates = self._updates(site, hidden_states, output.dtype)
        for cohort, (stack, update) in zip(self._plan.cohorts, updates, strict=True):
            if stack is None or site.name not in stack.columns:
                continue
            update = update[:, stack.columns[site.name]]
            row_scale = stack.row_scales.get(site.name)
            if row_scale is None:
                rows = rows.add_(update)
            else:  # DoRA's formula rebuilds the cohort's rows
                factors = cohort.scatter(row_scale.expand(-1, cohort.width, -1), blank=1.0)
                bias: Any = linear.bias
                bias = None if bias is None else bias.to(output.dtype)
                rows = decompose(rows, update, factors, bias)
        return rows.view(output.shape)

    def ffn(
        self,
        block: Block,
        hidden_states: Tensor,
        base_outputs: Callable[[Tensor], Sequence[Tensor]],
        down: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute an FFN block; see FfnBlock.

        Rows are put in the cohorts' order in front of the base's projections, and back behind them.
        """
        plan, gating = self._plan, block.gating
        cohorts = plan.cohorts[: plan.num_in_ffn]
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        if plan.ffn_take is not None:
            rows = rows.index_select(0, plan.ffn_take)
        outputs = base_outputs(rows)
        sizes = [len(cohort.counts) * cohort.width for cohort in cohorts]
        num_left = len(rows) - sum(sizes)
        if num_left:
            sizes.append(num_left)
        inputs_by_part = cut_rows(rows, sizes)
        outputs_by_part = list(zip(*(cut_rows(output, sizes) for output in outputs), strict=True))
        steps = []
        with outside_autocast(outputs[0]):
            for number, cohort in enumerate(cohorts):
                step = cohort.part(block).step(
                    cohort.side_by_side(inputs_by_part[number]),
                    [cohort.side_by_side(output) for output in outputs_by_part[number]],
                    gating,
                    partial(self._tokens, cohort, block.layer),
                )
                steps.append(step)
        hidden = [rows for rows, _ in steps]
        if num_left:
            hidden.append(gating(*outputs_by_part[-1]))
        output = down(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        base_outputs_of_parts = cut_rows(output, [len(part) for part in hidden])
        finished = list(base_outputs_of_parts)
        with outside_autocast(outputs[0]):
            for number, (_, finish) in enumerate(steps):
                finished[number] = finish(base_outputs_of_parts[number])
        # most steps write to the base's rows
        is_in_place = all(map(operator.is_, finished, base_outputs_of_parts))
        rows = output if is_in_place else torch.cat(finished)
        if plan.ffn_put is not None:
            rows = rows.index_select(0, plan.ffn_put)
        return rows.view(*hidden_states.shape[:-1], rows.shape[-1])

    def expert_updates(self, block: Block) -> list[ExpertUpdate]:
        """Describe the cohorts' rows to a block of stacked experts."""
        updates = []
        for cohort in self._plan.cohorts:
            weights = cohort.part(block)
            if weights is not None:
                tokens, entries = cohort.tokens_and_entries(self._plan.device)
                update = ExpertUpdate(
                    weights=weights.flat(),
                    tokens=tokens,
                    entries=entries,
                    num_entries=len(cohort.counts),
                )
                updates.append(update)
        return updates

    def _tokens(self, cohort: Cohort, layer: int, index: int) -> SegmentTokens:
        """Describe an adapter's rows in a layer; padding at their end is not real."""
        count = cohort.counts[index]
        adapter, _ = cohort.stack.adapters[cohort.entries][index]
        record = recorder_of(self._record, adapter) if count else None
        real_index = None
        if count < cohort.width and record is not None:
            real_index = torch.arange(count, device=self._plan.device)
        return SegmentTokens(layer, None, real_index, None, record, self._plan.row_length)

    def _updates(
        self, site: ProjectionSite, hidden_states: Tensor, dtype: torch.dtype
    ) -> Sequence[tuple[StackedInput | None, Tensor]]:
        """Every cohort's update of projections with one input, [T, ΣO]; kept for the next one."""
        key = (site.block, site.group)
        if self._shared[0] is hidden_states and self._shared[1] == key:
            return self._shared[2]
        rows = hidden_states.view(-1, hidden_states.shape[-1]).to(dtype)
        updates = []
        for cohort in self._plan.cohorts:
            stack, update = cohort.part(site.block, site.group), rows
            if stack is not None:
                taken = rows if cohort.take is None else rows.index_select(0, cohort.take)
                tokens = partial(self._tokens, cohort, site.block.layer)
                update = cohort.scatter(stack.update(cohort.side_by_side(taken), tokens))
            updates.append((stack, update))
        self._shared = (hidden_states, key, updates)
        return updates


def cut_rows(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Cut rows into parts; views cost as much as small products do."""
    return [rows] if len(sizes) == 1 else rows.split(list(sizes))
