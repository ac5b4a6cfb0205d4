"""`expert_ffn.py`'s FFN block of one adapter's tokens in the memory of a plain LoRA.

Kept for the backward pass: the block's input, the outputs of the base's input projections (gate
and up), the rank-space activations and the routing. The hidden states of the slots, K·T·F wide, are
computed again, in pieces.

Numerics: products and sums over slots run in the dtype of the outputs (matrix products accumulate
in float32 inside); gradients of weights are summed over pieces in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.expert_ffn import FfnDropout, FfnWeights, Routing
from loraloom.ops.gating import Gating, gate_with_gradients
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
    outputs: Sequence[Tensor],
    weights: FfnWeights,
    routing: Routing | None,
    gating: Gating,
    dropout: FfnDropout,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what `expert_ffn` computes; it and the function returned write to the base's outputs.

    The outputs, as gate and up, are written to where one expert has all tokens.
    """
    dtype = outputs[0].dtype
    slots = Slots.of(weights, routing, outputs[0])
    low_rank: Any = None
    if weights.input_A is not None:
        arguments = (hidden_states, weights.input_A, dropout.keep_input, dropout.probability)
        if slots.group is None:
            low_rank = down_project(*arguments)
        else:
            low_rank = GroupedDown.apply(*arguments, slots)
    slot_weights = None if routing is None else routing.routing_weights.to(dtype)
    sides = [_Side.of(side, slots) for side in weights.inputs]
    hidden, down_rank = _LeanFfn.apply(  # pyright: ignore[reportGeneralTypeIssues]
        _Block(slots, gating, dropout.scale, weights.width, sides),
        *outputs,
        low_rank,
        *(None if side is None else side.B for side in weights.inputs),
        *(None if side is None else side.row_scale for side in weights.inputs),
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
    gating: Gating
    dropout_scale: float
    width: int  # of the hidden states, F
    sides: Sequence[_Side | None]  # one for each input projection

    def unpack(self, tensors: Sequence[Any]) -> _Tensors:
        """Sort the function's tensors, in the order in which it takes them."""
        count = len(self.sides)
        outputs = tensors[:count]
        low_rank = tensors[count]
        matrices = tensors[count + 1 : 2 * count + 1]
        scales = tensors[2 * count + 1 : 3 * count + 1]
        down_A, slot_weights, *keep_slots = tensors[3 * count + 1 :]
        projections = [
            _Projection(output, low_rank, lora_B, row_scale, side, self.slots.routed)
            for output, lora_B, row_scale, side in zip(
                outputs, matrices, scales, self.sides, strict=True
            )
        ]
        return _Tensors(projections, low_rank, down_A, slot_weights, keep_slots)


@dataclass(frozen=True)
class _Tensors:
    projections: Sequence[_Projection]
    low_rank: Tensor | None
    down_A: Tensor | None
    slot_weights: Tensor | None
    keep_slots: Sequence[Tensor | None]


@dataclass(frozen=True)
class _Rows:
    value: Tensor  # with the update, [t, F]
    unscaled: Tensor  # before DoRA's row scale, without the bias
    rank_input: Tensor | None = None  # what B multiplied
    excess: Tensor | None = None  # DoRA's factors less 1


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
            return _Rows(value, value, rank_input)
        excess, out = piece.of_rows(self.excess), output if piece.copies else None
        value, rows = decompose_rows(output, rank_input, own_B, excess, self.side.bias, out)
        return _Rows(value, rows, rank_input, excess)


class _LeanFfn(torch.autograd.Function):
    """(outputs, rank-space input) -> (Σ_j g_j h_j, rank-space input of the down update).

    With u_i = output_i + z_i B_i (z the rank-space input, masked to the slot's expert),
    h = gating(u), y = Σ_j g_j h_j and z_d = Σ_j g_j drop(h_j) A_dᵀ, the backward pass has for each
    slot, from ∂y [T, F] and ∂z_d [T, S]:

        ∂g_j = <∂y, h_j> + <∂z_d, drop(h_j) A_dᵀ>       by row
        ∂h_j = g_j (∂y + drop(∂z_d A_d))
        ∂u_i = (∂h_j/∂u_i)ᵀ ∂h_j
        ∂output_i += ∂u_i,  ∂B_i += z_iᵀ ∂u_i,  ∂z_i += ∂u_i B_iᵀ
        ∂A_d += (g_j ∂z_d)ᵀ drop(h_j)

    Only ∂h/∂u needs autograd, whatever gating the family has: a graph over one piece and one
    function. Where slots stay apart each has its own rows in y, and g is applied behind the base.
    """

    @staticmethod
    def forward(ctx, block, *inputs):
        # Segments are views of one tensor: with its version counter, each one's update would
        # invalidate what the others have saved.
        count, slots = len(block.sides), block.slots
        saved = (*(output.data for output in inputs[:count]), *inputs[count:])
        like = saved[0]
        tensors = block.unpack(saved)
        down_A, keep_slots = tensors.down_A, tensors.keep_slots
        apart = None
        if slots.apart:
            apart = like.new_empty(slots.experts.numel(), block.width)
        total = Total(slots, block.width, like)
        ordered = slots.by_place(tensors.slot_weights)
        # Both are kept, as they are narrow: a weight, which may be 0, can't be divided out again.
        unweighted: Any = None if down_A is None else slots.new_rank_space(like)
        weighted = unweighted
        if down_A is not None and ordered is not None:
            weighted = torch.zeros_like(unweighted)
        for piece in slots.pieces(block.width, like.dtype):
            rows = [projection.rows(piece, is_forward=True) for projection in tensors.projections]
            states = block.gating(*(row.value for row in rows))
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
        ctx.save_for_backward(*saved, unweighted)
        hidden = total.value if apart is None else apart
        return hidden, like.new_empty(0) if weighted is None else weighted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_down):  # pyright: ignore
        backward = _Backward(ctx.block, *ctx.saved_tensors)
        for piece in ctx.block.slots.pieces(ctx.block.width, grad_hidden.dtype):
            backward.accumulate(piece, grad_hidden, grad_down)
        return None, *backward.gradients()


class _Backward:
    """Gradients of the function's tensors, summed up over pieces."""

    def __init__(self, block: _Block, *saved: Any):
        *inputs, self.unweighted = saved
        tensors = block.unpack(inputs)
        self.block = block
        self.projections = tensors.projections
        self.down_A: Any = tensors.down_A
        self.keep_slots = tensors.keep_slots
        low_rank, weights = tensors.low_rank, tensors.slot_weights
        self.grad_low_rank = None if low_rank is None else torch.zeros_like(low_rank)
        self.grads = [
            _Gradients(projection, self.grad_low_rank, block.slots)
            for projection in self.projections
        ]
        self.adapts_down = self.down_A is not None
        self.grad_down_A: Any = zeros_for_gradient(self.down_A) if self.adapts_down else None
        self.slot_weights = block.slots.by_place(weights)
        self.grad_weights: Any = None if weights is None else torch.empty_like(self.slot_weights)

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (
            *(grads.output for grads in self.grads),
            self.grad_low_rank,
            *(grads.lora_B for grads in self.grads),
            *(grads.row_scale for grads in self.grads),
            self.grad_down_A,
            self.block.slots.by_token(self.grad_weights),
            *(None for _ in self.keep_slots),
        )

    def accumulate(self, piece: Piece, grad_hidden: Tensor, grad_down: Tensor) -> None:
        rows = [projection.rows(piece) for projection in self.projections]
        values = [row.value for row in rows]
        states, vector_jacobian = gate_with_gradients(self.block.gating, values)
        grad_states = self._grad_states(piece, grad_hidden, grad_down, states)
        for grads, row, grad in zip(self.grads, rows, vector_jacobian(grad_states), strict=True):
            grads.add(piece, row, grad)

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
        self._output = Total(slots, projection.output.shape[1], projection.output)
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
