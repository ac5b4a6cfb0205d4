"""The low-rank arithmetic of a few tokens of several like adapters at once, without gradients.

Axes: N adapters, n token rows of each (padded to the longest), T token rows of the batch, K top_k,
I in_features, D hidden, F feed-forward, O out_features, E experts, S = E·R, P columns of a product.

The same numbers as `expert_ffn.py`. A decoding step is bound by the count of operations, so the
weights of like adapters are stacked and every product is one batched product: no sort, no loop
over experts or adapters. A batch entry holds the rows and weights of one adapter alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraloom.ops.expert_ffn import Activation, combine_slots
from loraloom.ops.low_rank import decompose
from loraloom.routing.top_k import top_k_routing


@dataclass(frozen=True)
class StackedInput:
    """Projections with one input.

    Args:
        A: Down-projections side by side, [N, I, P].
        B: Scaled up-projections, block-diagonal over the projections, [N, P, O].
        columns: Each projection's columns of the update, by name.
        row_scales: DoRA's factors c by name, [N, o] float32; empty without DoRA.
    """

    A: Tensor
    B: Tensor
    columns: Mapping[str, slice]
    row_scales: Mapping[str, Tensor]


@dataclass(frozen=True)
class StackedSide:
    """The B side of an FFN's input projection.

    Args:
        columns: Its columns of the input product.
        B: Scaled up-projections, [N, S, F].
        row_scale: DoRA's factors, [N·E, F] float32; None without DoRA.
        bias: The base's bias, which DoRA leaves unscaled.
    """

    columns: slice
    B: Tensor
    row_scale: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class StackedFfn:
    """An FFN block's weights of like adapters; what no adapter targets is None.

    Args:
        input_A: Down-projections of the block's input, [N, D, P].
        gate: B side of the gate (or only) input projection.
        up: B side of up.
        down_A: Down-projections of the hidden states, [N, F, S].
        down_B: Scaled up-projections, [N, S, D].
        down_row_scale: DoRA's factors of the output projection, [N·E, D] float32.
        down_bias: The base's bias, [D].
        router: [N, D, E] float32; None for plain adapters.
        expert_columns: 1 at the columns of each expert, [E, S].
        top_k: K.
        apart: Slots are not added up in front of the base's output projection.
    """

    input_A: Tensor | None
    gate: StackedSide | None
    up: StackedSide | None
    down_A: Tensor | None
    down_B: Tensor | None
    down_row_scale: Tensor | None
    down_bias: Tensor | None
    router: Tensor | None
    expert_columns: Tensor
    top_k: int
    apart: bool

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_columns)


@dataclass(frozen=True)
class StackedRouting:
    """What the routers did: logits [N, n, E], experts [N, n, K] and their weights [N, n, K]."""

    router_logits: Tensor
    selected_experts: Tensor
    routing_weights: Tensor


class StackedFfnStep:
    """One pass of an FFN block, to both sides of the base's output projection.

    Args:
        weights: The adapters'.
        hidden_states: The block's input, [N, n, D].
        gate: Base output of the gate, or of the only input projection, [N, n, F].
        up: Base output of up, [N, n, F], or None.
        act: The base's activation.
    """

    def __init__(
        self,
        weights: StackedFfn,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
    ):
        self.weights = weights
        self.routing = None if weights.router is None else _route(weights, hidden_states)
        self._slot_weights: list[Tensor] | None = None
        self._masks: Tensor | None = None
        self._factors_of: Tensor | None = None
        if self.routing is not None:
            selected = self.routing.selected_experts
            self._masks = embedding(selected, weights.expert_columns)  # (N, n, K, S)
            self._slot_weights = list(
                self.routing.routing_weights.to(gate.dtype).unsqueeze(-1).unbind(2)
            )
            if weights.num_experts * len(selected) > 1:
                first = torch.arange(len(selected), device=selected.device) * weights.num_experts
                self._factors_of = selected + first[:, None, None]
        low_rank = None
        if weights.input_A is not None:
            low_rank = torch.bmm(hidden_states.to(gate.dtype), weights.input_A)
        states = act(self._project(gate, low_rank, weights.gate))
        if up is not None:
            states = states * self._project(up, low_rank, weights.up)
        self._down_rank = self._reduce(states)
        self.hidden = self._hidden_rows(states)
        """Rows for the base's output projection: [N·n, F], or [N·n·K, F] where slots stay apart."""

    def finish(self, output: Tensor) -> Tensor:
        """Go from the base's output projection of `hidden` to the block's output, [N·n, D]."""
        weights, down_rank = self.weights, self._down_rank
        if weights.down_B is not None and down_rank is not None:
            update = torch.bmm(down_rank.flatten(1, -2), weights.down_B).flatten(0, 1)
            if weights.down_row_scale is None:
                output = output + update
            else:
                rows = update.view(*self._slot_shape, update.shape[-1])
                factors = self._factors(weights.down_row_scale, rows)
                output = decompose(output.view_as(rows), rows, factors, weights.down_bias)
        if not weights.apart:
            return output
        return self._combined(output.view(*self._slot_shape, output.shape[-1])).flatten(0, 1)

    def _project(self, output: Tensor, low_rank: Tensor | None, side: StackedSide | None) -> Tensor:
        """Adapt an input projection: [N, n, F], or [N, n, K, F] of a mixture."""
        if self._masks is not None:
            output = output.unsqueeze(2)
        if low_rank is None or side is None:
            return output
        low_rank = low_rank[..., side.columns]
        if self._masks is None:
            update = torch.bmm(low_rank, side.B)
        else:
            masked = low_rank.unsqueeze(2) * self._masks
            update = torch.bmm(masked.flatten(1, 2), side.B)
            update = update.view(*masked.shape[:-1], side.B.shape[-1])
        if side.row_scale is None:
            return update.add_(output)
        return decompose(
            output.expand_as(update), update, self._factors(side.row_scale, update), side.bias
        )

    def _factors(self, row_scale: Tensor, rows: Tensor) -> Tensor:
        """DoRA's factors of every row's adapter and expert."""
        if self._masks is None:
            return row_scale.unsqueeze(1)
        if self._factors_of is None:
            return row_scale.expand_as(rows)
        return embedding(self._factors_of, row_scale)

    def _reduce(self, states: Tensor) -> Tensor | None:
        """Go to the rank space of the output projection, [N, n, [K,] S], combined if it may be."""
        if self.weights.down_A is None:
            return None
        if self._masks is None:
            return torch.bmm(states, self.weights.down_A)
        if states.shape[2] == 1:  # neither gate nor up is adapted
            states = states.expand(-1, -1, self.weights.top_k, -1)
        down_rank = torch.bmm(states.flatten(1, 2), self.weights.down_A)
        down_rank = down_rank.view(self._masks.shape) * self._masks
        return down_rank if self.weights.apart else self._combined(down_rank)

    def _hidden_rows(self, states: Tensor) -> Tensor:
        if self._masks is not None and states.shape[2] == 1:
            states = states.expand(-1, -1, self.weights.top_k, -1)
        self._slot_shape = states.shape[:-1]
        if not self.weights.apart:
            states = self._combined(states)
        return states.reshape(-1, states.shape[-1])

    def _combined(self, slots: Tensor) -> Tensor:
        """Add up a mixture's slots by their weights, [N, n, ...]."""
        if self._slot_weights is None:
            return slots
        return combine_slots(slots.unbind(2), self._slot_weights)


def _route(weights: StackedFfn, hidden_states: Tensor) -> StackedRouting:
    router: Tensor = weights.router  # pyright: ignore[reportAssignmentType]
    logits = torch.bmm(hidden_states.to(router.dtype), router)
    selected, slot_weights = top_k_routing(logits.flatten(0, 1), weights.top_k)
    shape = (*logits.shape[:2], weights.top_k)
    return StackedRouting(logits, selected.view(shape), slot_weights.view(shape))
