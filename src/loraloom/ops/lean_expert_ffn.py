"""`expert_ffn.py`'s FFN block of one adapter's tokens in the memory of a plain LoRA.

Kept for the backward pass: the block's input, the base's gate and up, the rank-space activations
and the routing. The hidden states of the slots, K·T·F wide, are computed again, in pieces.

Numerics: products and sums over slots run in the dtype of `gate` (matrix products accumulate in
float32 inside); gradients of weights are summed over pieces in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, Routing
from loraloom.ops.fused.expert_ffn import fused_hidden, has_kernels, is_fused
from loraloom.ops.grouped_products import (
    CombineSlots,
    GroupedDown,
    GroupedUp,
    RankGradients,
    excess_rows,
    zeros_for_gradient,
)
from loraloom.ops.low_rank import (
    UpProjection,
    add_low_rank_,
    add_product_over_tokens_,
    decompose_rows,
    down_project,
)
from loraloom.ops.slot_pieces import Piece, Slots, Total


def lean_expert_ffn(
    hidden_states: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weights: FfnWeights,
    routing: Routing | None,
    act: Activation,
    dropout: FfnDropout,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what `expert_ffn` computes; it and the function returned write to the base's outputs.

    Gate and up are written to where one expert has all tokens.
    """
    slots = Slots.of(weights, routing, gate)
    low_rank: Any = None
    if weights.input_A is not None:
        arguments = (hidden_states, weights.input_A, dropout.keep_input, dropout.probability)
        if slots.group is None:
            low_rank = down_project(*arguments)
        else:
            low_rank = GroupedDown.apply(*arguments, slots)
    slot_weights = None if routing is None else routing.routing_weights
    if is_fused(gate) and has_kernels(weights, act):
        experts = slots.experts if slots.routed else None
        hidden, down_rank = fused_hidden(
            gate, up, low_rank, weights, experts, slot_weights, dropout
        )
    else:
        if slot_weights is not None:
            slot_weights = slot_weights.to(gate.dtype)
        sides = (weights.gate, weights.up)
        hidden, down_rank = _LeanFfn.apply(  # pyright: ignore[reportGeneralTypeIssues]
            _Block(slots, act, dropout.scale, *(_Side.of(side, slots) for side in sides)),
            gate,
            up,
            low_rank,
            *(weight for side in sides for weight in (side and side.B, side and side.row_scale)),
            weights.down_A,
            None if slots.apart else slot_weights,
            *dropout.keep_slots,
        )
    return hidden, partial(_finish, down_rank, weights.down, slot_weights, slots)


def _finish(
    down_rank: Tensor,
    down: UpProjection | None,
    slot_weights: Tensor | None,
    slots: Slots,
    output: Tensor,
) -> Any:
    parts = (None, None, None) if down is None else (down.B, down.row_scale, down.bias)
    if slots.apart and (slots.routed or parts[1] is not None):
        weights = None if slot_weights is None else slot_weights.to(output.dtype)
        return CombineSlots.apply(output, down_rank, *parts, weights, slots)
    if down is None:
        return output
    # Autograd lets nobody write to one of several views, as the rows of a segment are.
    rows = output if output._base is None else output.clone()
    if slots.group is not None:
        return GroupedUp.apply(rows, down_rank, down.B, slots)
    return add_low_rank_(rows, [slice(None)], [down_rank], [down.B])


@dataclass(frozen=True)
class _Side:
    columns: slice
    bias: Tensor | None

    @staticmethod
    def of(projection: UpProjection | None, slots: Slots) -> _Side | None:
        if projection is None:
            return None
        place = projection.columns.start // (slots.num_experts * slots.rank)
        return _Side(slice(place * slots.columns, (place + 1) * slots.columns), projection.bias)


@dataclass(frozen=True)
class _Block:
    """What the function needs besides tensors that autograd is to save."""

    slots: Slots
    act: Activation
    dropout_scale: float
    gate: _Side | None
    up: _Side | None

    def projections(self, gate, up, low_rank, gate_B, gate_c, up_B, up_c) -> list[_Projection]:
        def make(output, lora_B, row_scale, side):
            return _Projection(output, low_rank, lora_B, row_scale, side, self.slots.routed)

        first = make(gate, gate_B, gate_c, self.gate)
        return [first] if up is None else [first, make(up, up_B, up_c, self.up)]


@dataclass(frozen=True)
class _Rows:
    value: Tensor  # with the update, [t, F]
    unscaled: Tensor  # before DoRA's row scale, without the bias
    rank_input: Tensor | None = None  # what B multiplied
    excess: Tensor | None = None  # DoRA's factors less 1
    is_kept: bool = True  # what autograd saves, or the base's own output

    def times(self, factor: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply the value for the last time, in place if nobody needs it."""
        if out is None and not self.is_kept:
            return self.value.mul_(factor)
        return torch.mul(self.value, factor, out=out)


class _Projection:
    def __init__(
        self, output: Tensor, low_rank: Any, lora_B: Any, row_scale: Any, side: Any, is_routed: bool
    ):
        self.output, self.lora_B, self.row_scale, self.side = output, lora_B, row_scale, side
        self.is_routed = is_routed
        self.low_rank = None if side is None or low_rank is None else low_rank[:, side.columns]
        self.excess = None if row_scale is None else excess_rows(row_scale, output.dtype)

    def rows(self, piece: Piece, *, is_forward: bool = False) -> _Rows:
        output = piece.take(self.output)
        if self.low_rank is None or piece.columns is None:
            return _Rows(output, output)
        rank_input, own_B = piece.take_rank(self.low_rank), piece.of_experts(self.lora_B)
        if self.excess is None:
            # One expert's update stays in the base's output, which is all that has to be kept. Of
            # several, each has a copy of its own to add to, or makes one.
            if not self.is_routed:
                value = output.addmm_(rank_input, own_B) if is_forward else output
                return _Rows(value, value, rank_input)
            add = output.addmm_ if piece.copies else partial(torch.addmm, output)
            value = add(rank_input, own_B)
            return _Rows(value, value, rank_input, is_kept=False)
        excess, out = piece.of_rows(self.excess), output if piece.copies else None
        value, rows = decompose_rows(output, rank_input, own_B, excess, self.side.bias, out)
        return _Rows(value, rows, rank_input, excess, is_kept=False)


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

    Only act' needs autograd, whatever activation the family has: a graph over one piece and one
    function. Where slots stay apart each has its own rows in y, and g is applied behind the base.
    """

    @staticmethod
    def forward(ctx, block, gate, up, *others):
        # Segments are views of one tensor: with its version counter, each one's update would
        # invalidate what the others have saved.
        tensors = (gate.data, up if up is None else up.data, *others)
        *inputs, down_A, slot_weights = tensors[:9]
        keep_slots, slots = tensors[9:], block.slots
        projections = block.projections(*inputs)
        apart = None
        if slots.apart:
            apart = gate.new_empty(slots.experts.numel(), gate.shape[1])
        total = Total(slots, gate)
        ordered = slots.by_place(slot_weights)
        # Both are kept, as they are narrow: a weight, which may be 0, can't be divided out again.
        unweighted: Any = None if down_A is None else slots.new_rank_space(gate)
        weighted = unweighted
        if down_A is not None and slot_weights is not None:
            weighted = torch.zeros_like(unweighted)
        for piece in slots.pieces(gate):
            inner, *outer = (projection.rows(piece, is_forward=True) for projection in projections)
            states = block.act(inner.value)
            for rows in outer:
                states = rows.times(states)
            weight = None if ordered is None else piece.take_slots(ordered)
            if down_A is not None and piece.columns is not None:
                down = piece.drop(states, keep_slots) @ piece.of_experts(down_A).T
                down = piece.keep_rank(down)
                down = down if block.dropout_scale == 1 else down * block.dropout_scale
                piece.add_rank(unweighted, down)
                if weight is not None:
                    piece.add_rank(weighted, down * weight)
            if apart is not None:
                piece.take_slots(apart).copy_(states)
            elif weight is not None and piece.copies:
                total.add(piece, states.mul_(weight))
            else:
                total.add(piece, states, weight)
        ctx.block = block
        ctx.save_for_backward(*tensors, unweighted)
        hidden = total.value if apart is None else apart
        return hidden, gate.new_empty(0) if weighted is None else weighted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_down):  # pyright: ignore
        backward = _Backward(ctx.block, *ctx.saved_tensors)
        for piece in ctx.block.slots.pieces(grad_hidden):
            backward.accumulate(piece, grad_hidden, grad_down)
        return None, *backward.gradients()


class _Backward:
    """Gradients of the function's tensors, summed up over pieces."""

    def __init__(self, block: _Block, *saved: Any):
        inputs, self.down_A, weights = saved[:7], saved[7], saved[8]
        self.block, self.keep_slots, self.unweighted = block, saved[9:-1], saved[-1]
        self.projections = block.projections(*inputs)
        self.grad_low_rank = None if inputs[2] is None else torch.zeros_like(inputs[2])
        self.grads = [_Gradients(p, self.grad_low_rank, block.slots) for p in self.projections]
        self.adapts_down = self.down_A is not None
        self.grad_down_A: Any = zeros_for_gradient(self.down_A) if self.adapts_down else None
        self.slot_weights = block.slots.by_place(weights)
        self.grad_weights: Any = None if weights is None else torch.empty_like(self.slot_weights)

    def gradients(self) -> tuple[Tensor | None, ...]:
        gate, up = self.grads[0], self.grads[1] if len(self.grads) > 1 else None
        grad_weights = self.block.slots.by_token(self.grad_weights)
        return (
            gate.output, up and up.output, self.grad_low_rank, gate.lora_B, gate.row_scale,
            up and up.lora_B, up and up.row_scale, self.grad_down_A, grad_weights,
            *(None for _ in self.keep_slots),
        )  # fmt: skip

    def accumulate(self, piece: Piece, grad_hidden: Tensor, grad_down: Tensor) -> None:
        inner, *outer = (projection.rows(piece) for projection in self.projections)
        # A leaf of its own, so that the graph is as long as the activation.
        with torch.enable_grad():
            leaf = inner.value.detach().requires_grad_()
            activated = self.block.act(leaf)
        states = activated.detach()
        for rows in outer:
            states = states * rows.value
        grad_states = self._grad_states(piece, grad_hidden, grad_down, states)
        grad_activated = grad_states
        for grads, rows in zip(self.grads[1:], outer, strict=True):
            # The states' room is free; the gradient's is, where it is no view of the upstream's.
            grad_activated = rows.times(grad_states, out=states)
            out = None if grad_states._is_view() else grad_states
            grads.add(piece, rows, torch.mul(grad_states, activated.detach(), out=out))
        self.grads[0].add(piece, inner, torch.autograd.grad(activated, leaf, grad_activated)[0])

    def _grad_states(
        self, piece: Piece, grad_hidden: Tensor, grad_down: Tensor, states: Tensor
    ) -> Tensor:
        """Gradient of the hidden states; adds to those of the routing weights and down's A."""
        take = piece.take_slots if self.block.slots.apart else piece.take
        upstream, is_adapted = take(grad_hidden), self.adapts_down and piece.columns is not None
        grad_rank: Any = piece.take_rank(grad_down) if is_adapted else None
        add: Any = partial(torch.addmm, upstream)
        if self.slot_weights is not None:
            weight = piece.take_slots(self.slot_weights)
            grad_weight = (upstream * states).sum(-1, keepdim=True)
            if is_adapted:
                grad_weight += (grad_rank * piece.take_rank(self.unweighted)).sum(-1, keepdim=True)
                grad_rank = grad_rank * weight
            piece.take_slots(self.grad_weights).copy_(grad_weight)
            # Slots don't stay apart where they are weighted here, so a piece's copy is its own.
            upstream = upstream.mul_(weight) if piece.copies else upstream * weight
            add = upstream.addmm_
        if not is_adapted:
            return upstream
        if self.block.dropout_scale != 1:
            grad_rank = grad_rank * self.block.dropout_scale
        dropped, own_A = piece.drop(states, self.keep_slots), piece.of_experts(self.down_A)
        add_product_over_tokens_(piece.of_experts(self.grad_down_A), grad_rank, dropped)
        if dropped is states:
            return add(grad_rank, own_A)
        return upstream + piece.drop(grad_rank @ own_A, self.keep_slots)


class _Gradients:
    def __init__(self, projection: _Projection, grad_low_rank: Any, slots: Slots):
        self._output = Total(slots, projection.output)
        scale = projection.row_scale
        self.row_scale: Any = None if scale is None else zeros_for_gradient(scale)
        self.rank: Any = None
        if projection.low_rank is not None:
            self.rank = RankGradients(projection.lora_B, grad_low_rank[:, projection.side.columns])

    @property
    def output(self) -> Tensor:
        return self._output.value

    @property
    def lora_B(self) -> Tensor | None:
        return self.rank and self.rank.lora_B

    def add(self, piece: Piece, rows: _Rows, grad: Tensor) -> None:
        if rows.excess is not None:
            piece.add_row_scale(self.row_scale, grad * rows.unscaled)
            grad = torch.addcmul(grad, rows.excess, grad)
        self._output.add(piece, grad)
        if rows.rank_input is not None:
            self.rank.add(piece, rows.rank_input, grad)
