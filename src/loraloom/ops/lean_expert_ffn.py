"""The FFN block of one adapter's tokens in the memory of a plain LoRA.

Axes: T tokens, D hidden, F feed-forward, K top_k, E experts, R rank, S = E·R, P columns of the
input product.

The same numbers as `expert_ffn.py`, whose `expert_ffn` is this file's semantics. Kept for the
backward pass: the block's input, the base's gate and up, the rank-space activations and the
routing. The hidden states of the slots, K·T·F wide, are computed again. Slots go through in pieces
small enough that a piece's hidden states stay in the processor's cache; see `slot_pieces.py`.

Numerics: products and sums over slots run in the dtype of `gate` (matrix products accumulate in
float32 inside); gradients of weights are summed over pieces in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, Routing, combine_slots
from loraloom.ops.fused.expert_ffn import fused_hidden, has_kernels, is_fused
from loraloom.ops.grouped_products import (
    grouped_combine,
    grouped_down,
    grouped_up,
    zeros_for_gradient,
)
from loraloom.ops.low_rank import (
    UpProjection,
    decompose,
    decompose_rows_,
    down_project,
    excess_of,
    rows_of_experts,
)
from loraloom.ops.slot_pieces import Piece, Slots


def lean_expert_ffn(
    hidden_states: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weights: FfnWeights,
    routing: Routing | None,
    act: Activation,
    dropout: FfnDropout,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what `expert_ffn` computes; see there.

    Args:
        hidden_states: The block's input, [T, D].
        gate: Base output of the gate (or only) input projection, [T, F].
        up: Base output of up, [T, F], or None.
        weights: The adapter's weights.
        routing: Slots of each token; None for a plain LoRA (one expert with weight 1).
        act: The base's activation.
        dropout: Masks.

    Returns:
        Hidden rows ([T, F], or [K·T, F] where slots stay apart) and a function from the base's
        output for them, row by row, to the block's output, [T, D].
    """
    slots = Slots.of(weights, routing, gate)
    low_rank = None
    if weights.input_A is not None:
        keep, probability = dropout.keep_input, dropout.probability
        if slots.group is None:
            low_rank = down_project(hidden_states, weights.input_A, keep, probability)
        else:
            low_rank = grouped_down(hidden_states, weights.input_A, keep, probability, slots)
    slot_weights = None
    if routing is not None and not slots.apart:
        slot_weights = routing.routing_weights
    if is_fused(gate) and has_kernels(weights, act):
        experts = slots.experts if slots.routed else None
        hidden, down_rank = fused_hidden(
            gate, up, low_rank, weights, experts, slot_weights, act, dropout
        )
        return hidden, _finish(weights, routing, slots, down_rank)
    gate_side, up_side = (_Side.of(side, weights, slots) for side in (weights.gate, weights.up))
    block = _Block(slots, gate_side, up_side, act, dropout)
    hidden, down_rank = _LeanFfn.apply(  # pyright: ignore[reportGeneralTypeIssues]
        block,
        gate,
        up,
        low_rank,
        *_tensors(weights.gate),
        *_tensors(weights.up),
        weights.down_A,
        None if slot_weights is None else slot_weights.to(gate.dtype),
    )
    return hidden, _finish(weights, routing, slots, down_rank)


def _tensors(side: UpProjection | None) -> tuple[Tensor | None, Tensor | None]:
    """Return what of a projection has gradients: B, and DoRA's row scale."""
    return (None, None) if side is None else (side.B, side.row_scale)


def _finish(
    weights: FfnWeights, routing: Routing | None, slots: Slots, down_rank: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return what is to be done with the base's down-projection of the hidden rows."""
    down, num_slots = weights.down, len(slots.experts)
    if not slots.apart:
        if down is None:
            return lambda output: output
        if slots.group is None:
            return lambda output: torch.addmm(output, down_rank, down.B)
        return lambda output: grouped_up(output, down_rank, down.B, slots)

    def finish(output: Tensor) -> Tensor:
        slot_weights = None if routing is None else routing.routing_weights.to(output.dtype)
        if slots.group is not None and slot_weights is not None:
            return grouped_combine(output, down_rank, down, slot_weights, slots)
        outputs = output.chunk(num_slots)
        if down is not None:
            masks = slots.masks(down_rank.dtype)
            by_slot = [down_rank] if masks is None else [down_rank * mask for mask in masks]
            updates = [rows @ down.B for rows in by_slot]
            if down.row_scale is None:
                outputs = [rows + update for rows, update in zip(outputs, updates, strict=True)]
            else:
                scales = rows_of_experts(_with_unit_row(down.row_scale), slots.experts)
                outputs = [
                    decompose(*rows_of_slot, down.bias)
                    for rows_of_slot in zip(outputs, updates, scales, strict=True)
                ]
        if slot_weights is None:
            return outputs[0]
        return combine_slots(outputs, slot_weights.T.unsqueeze(-1))

    return finish


@dataclass(frozen=True)
class _Side:
    """An input projection: its columns of the input product and its bias."""

    columns: slice
    bias: Tensor | None

    @staticmethod
    def of(projection: UpProjection | None, weights: FfnWeights, slots: Slots) -> _Side:
        if projection is None:
            return _Side(slice(0, 0), None)
        place = projection.columns.start // (weights.num_experts * weights.rank)
        return _Side(slice(place * slots.columns, (place + 1) * slots.columns), projection.bias)


@dataclass(frozen=True)
class _Block:
    """What the function needs besides tensors that have gradients."""

    slots: Slots
    gate: _Side
    up: _Side
    act: Activation
    dropout: FfnDropout

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Choices and masks, which autograd is to save: checkpointing drops only what it sees."""
        return self.slots.experts, *self.dropout.keep_slots

    def without_tensors(self) -> _Block:
        dropout = replace(self.dropout, keep_input=None, keep_slots=())
        return replace(self, slots=self.slots.without_experts(), dropout=dropout)

    def with_tensors(self, experts: Tensor, *keep_slots: Tensor | None) -> _Block:
        dropout = replace(self.dropout, keep_slots=keep_slots)
        return replace(self, slots=self.slots.with_experts(experts), dropout=dropout)


@dataclass(frozen=True)
class _Projected:
    """An adapted input projection of a piece.

    Args:
        value: With the update, [t, F].
        unscaled: Before DoRA's row scale, without the bias.
        excess: DoRA's factors less 1; None where there are none.
        rank_input: What B multiplied; None where nothing is adapted.
    """

    value: Tensor
    unscaled: Tensor
    excess: Tensor | None
    rank_input: Tensor | None


@dataclass(frozen=True)
class _PieceStates:
    """A piece's way through the block.

    Args:
        inner: The adapted gate (or only input projection); its value is a leaf of a small graph.
        activated: Its activation, on that graph.
        outer: The adapted up.
        hidden: `activated ∘ outer`.
    """

    inner: _Projected
    activated: Tensor
    outer: _Projected | None
    hidden: Tensor


class _LeanFfn(torch.autograd.Function):
    """(gate, up, rank-space input) -> (Σ_j g_j h_j, rank-space input of the down update).

    With u = gate + z_g B_g, v = up + z_u B_u (z the rank-space input, masked to the slot's expert),
    h = act(u) ∘ v and y = Σ_j g_j h_j, z_d = Σ_j g_j drop(h_j) A_dᵀ, the backward pass has for each
    slot, from ∂y [T, F] and ∂z_d [T, S]:

        ∂g_j = <∂y, h_j> + <∂z_d, drop(h_j) A_dᵀ>       by row
        ∂h_j = g_j (∂y + drop(∂z_d A_d))
        ∂u   = act'(u) ∘ (∂h_j ∘ v),   ∂v = ∂h_j ∘ act(u)
        ∂gate += ∂u,  ∂B_g += z_gᵀ ∂u,  ∂z_g += ∂u B_gᵀ;   the same for up with ∂v
        ∂A_d += (g_j ∂z_d)ᵀ drop(h_j)

    h, u and v are K·T·F wide, so they are computed again, piece by piece; what is kept is T·F (the
    base's gate and up, which PEFT's layer keeps as well) or of rank-space width. Only act' needs
    autograd, whatever activation the family has: a graph over one piece and one function.
    """

    @staticmethod
    def forward(ctx, block, gate, up, low_rank, gate_B, gate_c, up_B, up_c, down_A, slot_weights):
        ctx.block = block.without_tensors()
        forward = _PieceForward(block, gate, up, low_rank, gate_B, gate_c, up_B, up_c)
        slots, dropout = block.slots, block.dropout
        if slots.apart:
            hidden = gate.new_empty(slots.experts.numel(), gate.shape[1])
        else:
            hidden = slots.new_total(gate)
        unweighted: Any = None if down_A is None else slots.new_rank_space(gate)
        weighted = unweighted
        if down_A is not None and slot_weights is not None:
            weighted = torch.zeros_like(unweighted)
        for piece in slots.pieces(gate):
            states = forward.states(piece).hidden
            weight = None if slot_weights is None else piece.slot_weights(slot_weights)
            if slots.apart:
                piece.put_slots(hidden, states)
            else:
                piece.add(hidden, states, weight)
            if down_A is None or not piece.adapted:
                continue
            dropped = piece.drop(states, dropout.keep_slots)
            down = piece.keep_rank(dropped @ piece.of_experts(down_A).T)
            down = down * dropout.scale if dropout.probability else down
            piece.add_rank(unweighted, down)
            if weight is not None:
                piece.add_rank(weighted, down * weight)
        ctx.save_for_backward(
            gate, up, low_rank, gate_B, gate_c, up_B, up_c, down_A, slot_weights, unweighted,
            *block.tensors(),
        )  # fmt: skip
        return hidden, gate.new_empty(0) if weighted is None else weighted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_down):  # pyright: ignore
        saved = ctx.saved_tensors
        tensors, (down_A, slot_weights, unweighted) = saved[:7], saved[7:10]
        block = ctx.block.with_tensors(*saved[10:])
        backward = _Backward(block, tensors, down_A, slot_weights, unweighted)
        for piece in block.slots.pieces(tensors[0]):
            backward.accumulate(piece, grad_hidden, grad_down)
        return None, *backward.gradients()


class _PieceForward:
    """The forward pass of one piece; with a graph over the activation alone."""

    def __init__(
        self, block, gate, up, low_rank, gate_B, gate_c, up_B, up_c, *, with_graph: bool = False
    ):
        self.block = block
        self.with_graph = with_graph
        self.gate, self.up, self.low_rank = gate, up, low_rank
        self.gate_B, self.up_B = gate_B, up_B
        self.gate_excess = _excess_rows(gate_c, gate.dtype)
        self.up_excess = _excess_rows(up_c, gate.dtype)

    def states(self, piece: Piece) -> _PieceStates:
        block = self.block
        inner = self._project(piece, self.gate, block.gate, self.gate_B, self.gate_excess)
        with torch.set_grad_enabled(self.with_graph):
            leaf = inner.value.detach().requires_grad_(self.with_graph)
            activated = block.act(leaf)
        inner = replace(inner, value=leaf)
        if self.up is None:
            return _PieceStates(inner, activated, None, activated.detach())
        outer = self._project(piece, self.up, block.up, self.up_B, self.up_excess)
        return _PieceStates(inner, activated, outer, activated.detach() * outer.value)

    def _project(
        self, piece: Piece, output: Tensor, side: _Side, lora_B: Any, excess: Any
    ) -> _Projected:
        """Adapt a piece of the base's output; a missing B stands for nothing adapted."""
        output = piece.take(output)
        if lora_B is None or self.low_rank is None or not piece.adapted:
            return _Projected(output, output, None, None)
        rank_input = piece.take_rank(self.low_rank[:, side.columns])
        own_B = piece.of_experts(lora_B)
        if excess is None:
            # A piece's own copy is added to; rows of the base's output are needed again.
            add = output.addmm_ if piece.copies else partial(torch.addmm, output)
            value = add(rank_input, own_B)
            return _Projected(value, value, None, rank_input)
        excess = piece.of_rows(excess)
        rows = output if piece.copies else output.clone()
        value = decompose_rows_(rows, rank_input, own_B, excess, side.bias)
        return _Projected(value, rows, excess, rank_input)


class _Backward:
    """Gradients of the function's tensors, summed up over pieces."""

    def __init__(
        self, block: _Block, tensors: Any, down_A: Any, slot_weights: Any, unweighted: Any
    ):
        gate, up, low_rank, gate_B, gate_c, up_B, up_c = tensors
        self.block = block
        self.forward = _PieceForward(block, *tensors, with_graph=True)
        self.down_A, self.slot_weights, self.unweighted = down_A, slot_weights, unweighted
        self.grad_gate = block.slots.new_total(gate)
        self.grad_up: Any = None if up is None else block.slots.new_total(up)
        self.grad_low_rank: Any = None if low_rank is None else torch.zeros_like(low_rank)
        self.grad_gate_B, self.grad_gate_c = _zeros(gate_B), _zeros(gate_c)
        self.grad_up_B, self.grad_up_c = _zeros(up_B), _zeros(up_c)
        self.grad_down_A: Any = _zeros(down_A)
        self.grad_weights: Any = None if slot_weights is None else torch.empty_like(slot_weights)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return them in the order of the function's tensors."""
        return (
            self.grad_gate, self.grad_up, self.grad_low_rank, self.grad_gate_B, self.grad_gate_c,
            self.grad_up_B, self.grad_up_c, self.grad_down_A, self.grad_weights,
        )  # fmt: skip

    def accumulate(self, piece: Piece, grad_hidden: Tensor, grad_down: Tensor) -> None:
        states = self.forward.states(piece)
        inner, outer = states.inner, states.outer
        grad_states = self._grad_states(piece, grad_hidden, grad_down, states.hidden)
        grad_activated = grad_states if outer is None else grad_states * outer.value
        grad_inner = torch.autograd.grad(states.activated, inner.value, grad_activated)[0]
        grad_inner = _unscale(piece, grad_inner, inner, self.grad_gate_c)
        piece.add(self.grad_gate, grad_inner)
        self._backproject(
            piece, grad_inner, inner, self.block.gate, self.forward.gate_B, self.grad_gate_B
        )
        if outer is None:
            return
        grad_outer = grad_states * states.activated.detach()
        grad_outer = _unscale(piece, grad_outer, outer, self.grad_up_c)
        piece.add(self.grad_up, grad_outer)
        self._backproject(
            piece, grad_outer, outer, self.block.up, self.forward.up_B, self.grad_up_B
        )

    def _grad_states(
        self, piece: Piece, grad_hidden: Tensor, grad_down: Tensor, states: Tensor
    ) -> Tensor:
        """Gradient of the hidden states; adds to those of the routing weights and down's A."""
        # Where slots stay apart (DoRA on the output projection, or a base that rounds rows) each
        # slot has rows of its own in `hidden`, and its weight is applied behind the base's layer.
        if self.block.slots.apart:
            upstream = piece.take_slots(grad_hidden)
        else:
            upstream = piece.take(grad_hidden)
        if self.slot_weights is None:
            return self._through_down(piece, upstream, grad_down, states, None)
        weight = piece.slot_weights(self.slot_weights)
        grad_weight = (upstream * states).sum(-1)
        if self.down_A is not None and piece.adapted:
            grad_rank = piece.take_rank(grad_down)
            grad_weight += (grad_rank * piece.take_rank(self.unweighted)).sum(-1)
        piece.put_slot_weights(self.grad_weights, grad_weight)
        return self._through_down(piece, upstream * weight, grad_down, states, weight)

    def _through_down(
        self,
        piece: Piece,
        grad_states: Tensor,
        grad_down: Tensor,
        states: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        """Add what comes through the low-rank update of the output projection."""
        if self.down_A is None or not piece.adapted:
            return grad_states
        dropout, down_A = self.block.dropout, piece.of_experts(self.down_A)
        grad_rank = piece.take_rank(grad_down)
        grad_rank = grad_rank if weight is None else grad_rank * weight
        if dropout.probability:
            grad_rank = grad_rank * dropout.scale
        dropped = piece.drop(states, dropout.keep_slots)
        grad_A = piece.of_experts(self.grad_down_A)
        grad_A += grad_rank.T @ dropped
        if dropped is states:
            return torch.addmm(grad_states, grad_rank, down_A)
        return grad_states + piece.drop(grad_rank @ down_A, dropout.keep_slots)

    def _backproject(
        self,
        piece: Piece,
        grad: Tensor,
        projected: _Projected,
        side: _Side,
        lora_B: Any,
        grad_B: Any,
    ) -> None:
        """Add a piece's part to the gradients of B and of the rank-space input."""
        if projected.rank_input is None:
            return
        own = piece.of_experts(grad_B)
        own += projected.rank_input.T @ grad
        grad_rank = piece.keep_rank(grad @ piece.of_experts(lora_B).T)
        piece.add_rank(self.grad_low_rank[:, side.columns], grad_rank)


def _unscale(piece: Piece, grad: Tensor, projected: _Projected, grad_c: Tensor | None) -> Tensor:
    """Go back through DoRA's row scale, adding to its gradient."""
    if projected.excess is None or grad_c is None:
        return grad
    piece.add_row_scale(grad_c, grad * projected.unscaled)
    return torch.addcmul(grad, projected.excess, grad)


def _with_unit_row(row_scale: Tensor) -> Tensor:
    """Append a row of ones, which expert -1 (padding) indexes."""
    return torch.cat([row_scale, torch.ones_like(row_scale[:1])])


def _excess_rows(row_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """DoRA's factors less 1, with a row for padding."""
    return None if row_scale is None else excess_of(_with_unit_row(row_scale), dtype)


def _zeros(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else zeros_for_gradient(tensor)
