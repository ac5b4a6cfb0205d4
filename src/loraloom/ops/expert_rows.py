"""The experts of a base model's mixture-of-experts block, with low-rank updates of many adapters.

Each token has K rows, one for each of its experts of the base; a row has J hidden rows, one for
each LoRA expert that the token's adapter chooses there, or one.

Axes: T tokens of the batch, K experts of the base for each, P = T·K rows, sorted by expert, H
hidden rows, E experts of the base, M LoRA experts in each, t tokens of an adapter, J of the M for
each, Q hidden rows of an adapter, G = M·E groups of weights, D hidden, F feed-forward,
I in_features, O out_features, R rank.

`y_t = Σ_k w_tk Σ_j g_tj Down_e,m(gating(Up_e,m(x_t)))`, e the k-th expert of token t in the base's
routing w, m the j-th in the adapter's routing g; `Up_e,m(x) = c ∘ (W_e x + B_e,m A_e,m x) + b_e`,
and Down alike. A plain LoRA is M = 1 and g = 1, and only DoRA has c.

The frozen products are those of all rows at once, in the order of transformers' default, so that
rows of the base model are what they are without adapters. An adapter's rows lie by group, so that
each of its products is one grouped product. The backward pass keeps x, the frozen product W_up x
and what lies in rank space. It draws dropout's masks and computes the elementwise rest again, goes
back through W_down by a product of its own, through the rest by autograd, and through W_up by a
product of its own.

Source: transformers 5.24, `integrations/moe.py`, for what a block without adapters computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.dropout import DrawMask, draw_rows
from loraloom.ops.expert_weights import ExpertSide, ExpertWeights
from loraloom.ops.gating import Gating
from loraloom.ops.grouped_rows import GroupedProduct, group_stops, multiply_groups
from loraloom.ops.low_rank import excess_of


@dataclass(frozen=True)
class ExpertUpdate:
    """An adapter's tokens in the block, or those of several like adapters without gradients."""

    weights: ExpertWeights
    tokens: Tensor | None  # their places among the batch's, [t]; None: all, in order
    entries: Tensor | None = None  # which of several like adapters has a token, [t]
    num_entries: int = 1  # how many of them there are
    choice: Tensor | None = None  # its LoRA experts in each base expert, [t, J]; -1: the base alone
    choice_weights: Tensor | None = None  # g, [t, J]
    keep_input: DrawMask | None = None  # draws dropout's mask, [t, D]
    # K·J of them, K by the rank of the base expert's number; each draws [t, F]
    keep_slots: Sequence[DrawMask] = ()
    dropout: float = 0.0


@dataclass(frozen=True)
class BaseExperts:
    """The base's projections of all experts, frozen."""

    up: Any  # a `StackedProjection`, [E, O, D]
    down: Any  # [E, D, F]
    gating: Gating


def expert_rows(
    hidden_states: Tensor,
    index: Tensor,
    weights: Tensor,
    base: BaseExperts,
    updates: Sequence[ExpertUpdate],
) -> Tensor:
    """Compute the block for all tokens, [T, D], by the base's routing, [T, K] each."""
    rows = _Rows(index, base, updates)
    if not torch.is_grad_enabled():
        return _forward(rows, hidden_states, weights, updates)[0]
    tensors = [tensor for update in updates for tensor in _tensors(update)]
    return _ExpertRows.apply(rows, updates, hidden_states, weights, *tensors)


def _tensors(update: ExpertUpdate) -> list[Tensor | None]:
    """List what an update is differentiated by."""
    tensors: list[Tensor | None] = []
    for side in (update.weights.up, update.weights.down):
        tensors += [None, None, None] if side is None else [side.A, side.B, side.row_scale]
    return [*tensors, update.choice_weights]


def _with_tensors(update: ExpertUpdate, tensors: Sequence[Any]) -> ExpertUpdate:
    up = None if tensors[0] is None else ExpertSide(*tensors[0:3])
    down = None if tensors[3] is None else ExpertSide(*tensors[3:6])
    weights = replace(update.weights, up=up, down=down)
    return replace(update, weights=weights, choice_weights=tensors[6])


_NUM_TENSORS = 7


class _Rows:
    """Which token and expert each row is of, and where each adapter's rows are."""

    def __init__(self, index: Tensor, base: BaseExperts, updates: Sequence[ExpertUpdate]):
        self.base = base
        self.num_tokens, self.top_k = index.shape
        self.num_experts: int = base.up.num_experts
        self.experts, self.order = torch.sort(index.flatten())
        self.tokens = self.order // self.top_k  # of each row, [P]
        self.slots = self.order % self.top_k
        self.stops = group_stops(self.experts, self.num_experts)
        # A slot has random numbers by its expert's number: base models may list them in any order.
        # The argsort of an argsort is each entry's place in sorted order.
        self.expert_order = index.argsort(1).argsort(1)[self.tokens, self.slots]
        token_owners, counts = self._owners(updates, index.device)
        num_slots = [1 if u.choice is None else u.choice.shape[1] for u in updates]
        num_slots.append(1)  # of tokens without an adapter
        sizes = []  # hidden rows of each adapter
        for count, slots_of_token in zip(counts, num_slots, strict=True):
            sizes.append(count * self.top_k * slots_of_token)
        row_owners = hidden_owners = token_owners[self.tokens]
        self.base_rows = None  # of each hidden row, [H]; None: they are the same
        self.choices = torch.zeros_like(self.tokens)  # which of its LoRA experts a row is of, j
        if max(num_slots) > 1:
            repeats = torch.tensor(num_slots, device=index.device)[row_owners]
            rows = torch.arange(len(row_owners), device=index.device)
            self.base_rows = rows.repeat_interleave(repeats, output_size=sum(sizes))
            first_rows = repeats.cumsum(0) - repeats
            hidden_rows = torch.arange(sum(sizes), device=index.device)
            self.choices = hidden_rows - first_rows[self.base_rows]
            hidden_owners = row_owners[self.base_rows]
        *by_adapter, _ = hidden_owners.argsort(stable=True).split(sizes)
        self.adapters = []
        for update, hidden in zip(updates, by_adapter, strict=True):
            self.adapters.append(_AdapterRows(self, update, hidden))
        self.is_scaled = any(
            update.weights.down is not None and update.weights.down.row_scale is not None
            for update in updates
        )
        # A row scale stands outside of W_down, and each hidden row then goes through it by itself.
        self.combines_before_down = not self.is_scaled

    def _owners(
        self, updates: Sequence[ExpertUpdate], device: torch.device
    ) -> tuple[Tensor, list[int]]:
        """Number each token's adapter, [T], and count their tokens; the last are those of none."""
        owners = torch.full((self.num_tokens,), len(updates), device=device)
        # A token's place among its adapter's, [T].
        self.local = torch.zeros(self.num_tokens, dtype=torch.long, device=device)
        counts = []
        for number, update in enumerate(updates):
            if update.tokens is None:
                owners.fill_(number)
                self.local = torch.arange(self.num_tokens, device=device)
                counts.append(self.num_tokens)
            else:
                count = len(update.tokens)
                owners[update.tokens] = number
                self.local[update.tokens] = torch.arange(count, device=device)
                counts.append(count)
        return owners, [*counts, self.num_tokens - sum(counts)]

    @cached_property
    def down_experts(self) -> tuple[Tensor, Tensor]:
        """Experts of the rows that go through the frozen down-projection, and where each ends."""
        if self.combines_before_down or self.base_rows is None:
            return self.experts, self.stops
        experts = self.expand(self.experts)
        return experts, group_stops(experts, self.num_experts)

    def expand(self, values: Tensor) -> Tensor:
        """Go from rows, [P, ...], to hidden rows, [H, ...]."""
        return values if self.base_rows is None else values[self.base_rows]

    def combine(self, values: Tensor, slot_weights: Tensor) -> Tensor:
        """Add weighted hidden rows up to rows."""
        if self.base_rows is None:
            return values
        total = values.new_zeros(len(self.tokens), values.shape[1])
        return total.index_add(0, self.base_rows, values * slot_weights)

    def join(self, rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Add rows up by token, weighted as the base model's router says, [T, D]."""
        weighted = rows * weights[self.tokens, self.slots].unsqueeze(1)
        ordered = torch.empty_like(weighted).index_copy_(0, self.order, weighted)
        return ordered.view(self.num_tokens, self.top_k, -1).sum(1).to(dtype)

    def slot_weights(self, updates: Sequence[ExpertUpdate], like: Tensor) -> Tensor:
        """Give g of the hidden rows, [H, 1]; 1 where there is no choice."""
        weights = like.new_ones(len(self.choices), 1)
        for rows, update in zip(self.adapters, updates, strict=True):
            if update.choice_weights is not None:
                chosen = update.choice_weights[rows.local, rows.choices].to(like.dtype)
                weights = weights.index_copy(0, rows.hidden, chosen.unsqueeze(1))
        return weights


class _AdapterRows:
    """An adapter's hidden rows, sorted by group, and which group of weights each has."""

    def __init__(self, rows: _Rows, update: ExpertUpdate, hidden: Tensor):
        base_rows = hidden if rows.base_rows is None else rows.base_rows[hidden]
        choices = rows.choices[hidden]
        local = rows.local[rows.tokens[base_rows]]
        num_experts = update.weights.num_adapted or rows.num_experts
        num_groups = update.weights.num_choices * num_experts
        groups = rows.experts[base_rows]
        entries = 0 if update.entries is None else update.entries[local]
        is_adapted = None
        if update.weights.places is not None:
            places = update.weights.places.view(update.num_entries, -1)  # [entries, E]
            groups = places[entries, groups]
            is_adapted = groups >= 0
            groups = groups.clamp_min(0)
        elif update.choice is not None:
            choice = update.choice[local, choices]
            is_adapted = choice >= 0
            groups = choice.clamp_min(0) * num_experts + groups
        groups = groups + entries * num_groups
        self.num_groups = update.num_entries * num_groups
        self.is_adapted = None  # 0 at rows without a LoRA, [Q, 1]
        if is_adapted is not None:
            groups, order = groups.sort(stable=True)
            hidden, base_rows, choices = hidden[order], base_rows[order], choices[order]
            local = local[order]
            self.is_adapted = is_adapted[order].unsqueeze(1)
        self.hidden = hidden
        self.base_rows = base_rows
        self.tokens = rows.tokens[base_rows]
        self.experts = rows.experts[base_rows]
        self.local = local
        self.choices = choices
        self.groups = groups
        # Rows of a plain LoRA come sorted by expert, which is their group; those of several
        # adapters are few, and not sorted.
        self.stops = group_stops(groups, self.num_groups) if update.entries is None else None
        num_slots = 1 if update.choice is None else update.choice.shape[1]
        self.slots = rows.expert_order[base_rows] * num_slots + choices  # whose mask a row has

    def product(self, inputs: Tensor, weights: Tensor, known: Tensor | None = None) -> Tensor:
        """Multiply each row, [Q, I], with its group of [G, I, O], or of those that are shared."""
        groups_per_weight = self.num_groups // len(weights)
        if self.stops is None:
            weights = weights[self.groups // groups_per_weight]
            return torch.bmm(inputs.unsqueeze(1), weights).squeeze(1)
        stops = self.stops[groups_per_weight - 1 :: groups_per_weight]
        return GroupedProduct.apply(inputs, weights, stops, known)

    def scale_change(
        self, update: Tensor, side: ExpertSide, frozen: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Compute Δ + (c - 1) ∘ (Wx + Δ) of an update Δ and DoRA's c."""
        assert side.row_scale is not None
        excess = excess_of(side.row_scale, frozen.dtype)[self.groups]
        if self.is_adapted is not None:
            excess = excess * self.is_adapted
        if bias is not None:
            frozen = frozen - bias[self.experts]
        return torch.addcmul(update, excess, frozen + update)

    def drop(self, values: Tensor, update: ExpertUpdate, is_up: bool) -> Tensor:
        """Apply dropout to the block's input, [Q, D], or to hidden states, [Q, F]."""
        if update.keep_input is None:
            return values
        keep = update.keep_input()[self.local] if is_up else self._keep_slots(update)
        return values * keep * (1 / (1 - update.dropout))

    def _keep_slots(self, update: ExpertUpdate) -> Tensor:
        """Draw each hidden row's mask, [Q, F]."""
        num_slots = len(update.keep_slots)
        num_tokens = len(self.local) // num_slots  # each has a row in each slot
        rows = (self.slots * num_tokens + self.local).argsort().tensor_split(num_slots)
        return draw_rows(update.keep_slots, rows)


def _gather(values: Tensor, indices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Give each adapter its rows: at once, so that the gradient is one sum over all of them."""
    if not indices:
        return []
    return values[torch.cat(list(indices))].split([len(index) for index in indices])


@dataclass(frozen=True)
class _Reduced:
    """An adapter's rows on one side of the block, in rank space."""

    adapter: _AdapterRows
    side: ExpertSide
    low_rank: Tensor  # A x, [Q, R]

    def times_B(self, weights: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """Multiply by B, with weights of the rows, [Q, 1], in front of it."""
        low_rank = self.low_rank
        if self.adapter.is_adapted is not None:
            low_rank = low_rank * self.adapter.is_adapted
        if weights is not None:
            low_rank = low_rank * weights.to(low_rank.dtype)
        return self.adapter.product(low_rank, self.side.B, known)


def _reduce(
    rows: _Rows,
    updates: Sequence[ExpertUpdate],
    values: Tensor,
    is_up: bool,
    known: Sequence[Tensor] = (),
) -> list[_Reduced]:
    """Bring what enters the up or the down side into rank space; `known` are its low ranks."""
    adapted = []
    for adapter, update in zip(rows.adapters, updates, strict=True):
        side = update.weights.up if is_up else update.weights.down
        if side is not None:
            adapted.append((adapter, update, side))
    sources = [adapter.tokens if is_up else adapter.hidden for adapter, _, _ in adapted]
    reduced = []
    for number, inputs in enumerate(_gather(values, sources)):
        adapter, update, side = adapted[number]
        dropped = adapter.drop(inputs, update, is_up)
        known_product = known[number] if known else None
        low_rank = adapter.product(dropped, side.A.transpose(1, 2), known_product)
        reduced.append(_Reduced(adapter, side, low_rank))
    return reduced


def _changes(reduced: Sequence[_Reduced], frozen: Tensor, bias: Tensor | None) -> Tensor:
    """Compute what all adapters add to their frozen rows, one adapter's behind the other's."""
    scaled = [each.adapter.hidden for each in reduced if each.side.row_scale is not None]
    frozen_rows = iter(_gather(frozen, scaled))
    changes = []
    for each in reduced:
        change = each.times_B()
        if each.side.row_scale is not None:
            change = each.adapter.scale_change(change, each.side, next(frozen_rows), bias)
        changes.append(change)
    return torch.cat(changes)


def _hidden_rows(reduced: Sequence[_Reduced]) -> Tensor:
    return torch.cat([each.adapter.hidden for each in reduced])


def _gate(rows: _Rows, up: Tensor, reduced: Sequence[_Reduced]) -> Tensor:
    """Go from the frozen product of the rows, [P, O], to the hidden rows' states, [H, F]."""
    frozen = rows.expand(up)
    if reduced:
        bias = rows.base.up.compute_bias(up.dtype)
        change = _changes(reduced, frozen, bias)
        frozen = frozen.index_add(0, _hidden_rows(reduced), change)
    return rows.base.gating(frozen)


def _down(rows: _Rows, frozen: Tensor, slot_weights: Tensor, reduced: Sequence[_Reduced]) -> Tensor:
    """Add the adapters' updates to the frozen down-projection, [P, D]."""
    total = frozen
    bias = rows.base.down.compute_bias(frozen.dtype)
    if bias is not None and rows.base_rows is not None and rows.combines_before_down:
        # Each slot would add b once, Σ g·b in all, of which one b is in the frozen product.
        excess = rows.combine(torch.ones_like(slot_weights), slot_weights) - 1
        total = total + excess * bias[rows.experts]
    if reduced:
        change = _changes(reduced, total, bias)
        hidden_rows = _hidden_rows(reduced)
        if rows.base_rows is not None and rows.combines_before_down:
            change = change * slot_weights[hidden_rows]
            hidden_rows = rows.base_rows[hidden_rows]
        total = total.index_add(0, hidden_rows, change)
    return total if rows.combines_before_down else rows.combine(total, slot_weights)


def _forward(
    rows: _Rows, hidden_states: Tensor, weights: Tensor, updates: Sequence[ExpertUpdate]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the block's output, and what its backward pass keeps.

    That is W_up x, [P, O], W_down h where its values are used again, and all A x and A h.
    """
    base = rows.base
    up = _frozen_product(hidden_states[rows.tokens], base.up, rows.experts, rows.stops)
    reduced_up = _reduce(rows, updates, hidden_states, is_up=True)
    hidden = _gate(rows, up, reduced_up)
    slot_weights = rows.slot_weights(updates, hidden)
    combined = rows.combine(hidden, slot_weights) if rows.combines_before_down else hidden
    frozen = _frozen_product(combined, base.down, *rows.down_experts)
    reduced_down = _reduce(rows, updates, hidden, is_up=False)
    output = _down(rows, frozen, slot_weights, reduced_down)
    output = rows.join(output, weights, hidden_states.dtype)
    low_ranks = [each.low_rank for each in (*reduced_up, *reduced_down)]
    return output, [up, frozen if rows.is_scaled else None, *low_ranks]


class _ExpertRows(torch.autograd.Function):
    """The block with a backward pass that keeps its input and the frozen products."""

    @staticmethod
    def forward(ctx, rows, updates, hidden_states, weights, *tensors):
        output, kept = _forward(rows, hidden_states, weights, updates)
        ctx.rows = rows
        # Without tensors: autograd keeps those, and checks that they don't change.
        ctx.updates = [_with_tensors(update, [None] * _NUM_TENSORS) for update in updates]
        ctx.save_for_backward(hidden_states, weights, *tensors, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows: _Rows = ctx.rows
        saved = ctx.saved_tensors
        num_leaves = 4 + len(ctx.updates) * _NUM_TENSORS  # and x, weights, W_up x, W_down h
        leaves: list[Any] = [
            None if tensor is None else tensor.detach().requires_grad_()
            for tensor in saved[:num_leaves]
        ]
        low_ranks = saved[num_leaves:]
        hidden_states, weights, *tensors, up, frozen = leaves
        updates = [
            _with_tensors(update, tensors[number * _NUM_TENSORS :][:_NUM_TENSORS])
            for number, update in enumerate(ctx.updates)
        ]
        num_up = sum(update.weights.up is not None for update in updates)
        grad_rows = grad[rows.tokens]
        with torch.enable_grad():
            reduced = _reduce(rows, updates, hidden_states, is_up=True, known=low_ranks[:num_up])
            hidden = _gate(rows, up, reduced)
            slot_weights = rows.slot_weights(updates, hidden)
            row_weights = weights[rows.tokens, rows.slots].unsqueeze(1)
            combined = rows.combine(hidden, slot_weights) if rows.combines_before_down else hidden
            reduced = _reduce(rows, updates, hidden, is_up=False, known=low_ranks[num_up:])
            if frozen is None:
                outputs, grads = _linear_outputs(
                    rows, reduced, grad_rows, row_weights, slot_weights
                )
                # weights stand in front of W_down
                combined = combined * row_weights.to(combined.dtype)
                grad_frozen = grad_rows
            else:
                output = _down(rows, frozen, slot_weights, reduced) * row_weights
                outputs, grads = [output], [grad_rows.to(output.dtype)]
                (grad_frozen,) = torch.autograd.grad(output, frozen, grads, retain_graph=True)
        grad_combined = _frozen_gradient(grad_frozen, rows.base.down, *rows.down_experts)
        outputs.append(combined)
        grads.append(grad_combined.to(combined.dtype))
        inputs = [leaf for leaf in leaves if leaf is not None and leaf is not frozen]
        gradients = iter(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
        all_gradients: list[Any] = [
            None if leaf is None or leaf is frozen else next(gradients) for leaf in leaves
        ]
        grad_hidden, grad_weights, *grad_tensors, grad_up, _ = all_gradients
        grad_inputs = _frozen_gradient(grad_up, rows.base.up, rows.experts, rows.stops)
        if grad_hidden is None:
            grad_hidden = torch.zeros_like(hidden_states)
        grad_hidden = grad_hidden.index_add(0, rows.tokens, grad_inputs.to(grad_hidden.dtype))
        return None, None, grad_hidden, grad_weights, *grad_tensors


def _linear_outputs(
    rows: _Rows,
    reduced: Sequence[_Reduced],
    grad_rows: Tensor,
    row_weights: Tensor,
    slot_weights: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the summands of the block's output but W_down h, and their gradients.

    Weights stand in front of B and of the biases: no summand's values are read, or computed.
    """
    outputs = []
    grads = []
    base_rows = [each.adapter.base_rows for each in reduced]
    for each, grad in zip(reduced, _gather(grad_rows, base_rows), strict=True):
        weights = row_weights[each.adapter.base_rows]
        if rows.base_rows is not None:
            weights = weights * slot_weights[each.adapter.hidden]
        unread = each.low_rank.new_zeros(1).expand(len(grad), grad.shape[1])
        change = each.times_B(weights, unread)
        outputs.append(change)
        grads.append(grad.to(change.dtype))
    bias = rows.base.down.compute_bias(grad_rows.dtype)
    if bias is not None:
        times = row_weights * rows.combine(torch.ones_like(slot_weights), slot_weights)
        outputs.append(times)
        grads.append((grad_rows * bias[rows.experts]).sum(1, keepdim=True).to(times.dtype))
    return outputs, grads


def _frozen_product(rows: Tensor, base: Any, experts: Tensor, stops: Tensor) -> Tensor:
    """Compute W_e x + b_e of rows that are sorted by expert, [n, O]."""
    weight = base.weight
    output = multiply_groups(rows.to(weight.dtype), weight.transpose(1, 2), stops)
    bias = base.compute_bias(output.dtype)
    return output if bias is None else output.add_(bias[experts])


def _frozen_gradient(grad: Tensor, base: Any, experts: Tensor, stops: Tensor) -> Tensor:
    weight = base.weight
    return multiply_groups(grad.to(weight.dtype).contiguous(), weight, stops)
