"""`expert_ffn.py`'s FFN block of one adapter's tokens in the memory of a plain LoRA.

Kept for the backward pass: the block's input, the outputs of the base's input projections (gate
and up), the rank-space activations and the routing. The hidden states of the slots, K·T·F wide, are
computed again, in pieces, and their dropout's masks drawn again.

Who may write to which tensor:
- Outputs of the base's input projections: the forward pass, where one expert has all tokens. It
  adds the update in place, and the backward pass finds it there. With routing nobody does.
- The base's output of the down-projection: `finish`, unless it is a view.
- Rows that a piece has gathered (`Piece.owns_rows`): whoever took them. Rows that are views of what
  all pieces share, gradients from above among them, are read only.
- What was added to a `Total`: nobody, as it may be the total itself.

Numerics: products and sums over slots run in the dtype of the outputs (matrix products accumulate
in float32 inside); gradients of weights are summed over pieces in float32 or better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.dropout import draw_mask
from loraloom.ops.expert_ffn import FfnDropout, FfnRows, FfnWeights, Routing
from loraloom.ops.fused import fused_on_accelerators, plus_product, without_graph
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
) -> FfnRows:
    """Compute the rows that the base's down-projection has to see, and what to do with its output.

    Outputs are those of the base's input projections, bias included, as gate and up, [T, F]. They
    are written to where one expert has all tokens. The rows are [T, F], or [K·T, F] where slots
    stay apart. Without routing all tokens have one expert.
    """
    slots = Slots.of(weights, routing, outputs[0])
    keep, p = dropout.keep_input, dropout.probability
    low_rank = None
    if weights.input_A is not None and slots.group is not None:
        low_rank = GroupedDown.apply(hidden_states, weights.input_A, keep, p, slots)
    elif weights.input_A is not None:
        low_rank = down_project(hidden_states, weights.input_A, keep, p)
    slot_weights = None if routing is None else routing.routing_weights.to(outputs[0].dtype)
    tensors = {
        "low_rank": low_rank,
        "down_A": weights.down_A,
        "slot_weights": None if slots.apart else slot_weights,
    }
    for number, (output, side) in enumerate(zip(outputs, weights.inputs, strict=True)):
        tensors[f"output {number}"] = output
        tensors[f"B {number}"] = None if side is None else side.B
        tensors[f"row_scale {number}"] = None if side is None else side.row_scale
    sides = [_Side.of(side, slots) for side in weights.inputs]
    block = _Block(slots, gating, dropout.scale, weights.width, sides, list(tensors))
    hidden, down_rank = _LeanFfn.apply(block, dropout.keep_slots, *tensors.values())
    return FfnRows(hidden, partial(_finish, down_rank, weights.down, slot_weights, slots))


def _finish(
    down_rank: Tensor,
    down: UpProjection | None,
    slot_weights: Tensor | None,
    slots: Slots,
    output: Tensor,
) -> Any:
    if down is None:
        return output
    if down.row_scale is not None:
        if slot_weights is not None:
            slot_weights = slot_weights.to(output.dtype)
        return CombineSlots.apply(
            output, down_rank, down.B, down.row_scale, down.bias, slot_weights, slots
        )
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
        number = projection.columns.start // (slots.num_experts * slots.rank)
        start = number * slots.columns
        return _Side(slice(start, start + slots.columns), projection.bias)


@dataclass(frozen=True)
class _Block:
    """What the function needs besides tensors that autograd is to save."""

    slots: Slots
    gating: Gating
    dropout_scale: float
    width: int  # of the hidden states, F
    sides: Sequence[_Side | None]  # one for each input projection
    names: Sequence[str]  # of the function's tensors, in the order in which it takes them

    def by_name(self, tensors: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, tensors, strict=True))

    def scale(self, values: Tensor) -> Tensor:
        """Divide what dropout kept by the probability to be kept."""
        return values if self.dropout_scale == 1 else values * self.dropout_scale

    def projections(self, tensors: Mapping[str, Any]) -> list[_Projection]:
        return [
            _Projection(
                output=tensors[f"output {number}"],
                low_rank=None if side is None else tensors["low_rank"],
                lora_B=tensors[f"B {number}"],
                row_scale=tensors[f"row_scale {number}"],
                side=side,
                is_routed=self.slots.routed,
            )
            for number, side in enumerate(self.sides)
        ]


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
        self.output = output
        self.lora_B = lora_B
        self.row_scale = row_scale
        self.side = side
        self.is_routed = is_routed
        self.low_rank = None if low_rank is None else low_rank[:, side.columns]
        self.excess = None if row_scale is None else excess_rows(row_scale, output.dtype)

    def add_update_(self) -> None:
        """Add the update to the base's output where all tokens have one expert without DoRA."""
        if self.low_rank is not None and self.excess is None and not self.is_routed:
            self.output.addmm_(self.low_rank, self.lora_B)

    def rows(self, piece: Piece) -> _Rows:
        output = piece.take(self.output)
        if self.low_rank is None or piece.columns is None:
            return _Rows(output, output)
        rank_input = piece.take_rank(self.low_rank)
        lora_B = piece.of_experts(self.lora_B)
        if self.excess is not None:
            excess = piece.of_rows(self.excess)
            out = output if piece.owns_rows else None
            value, unscaled = decompose_rows(
                output, rank_input, lora_B, excess, self.side.bias, out
            )
            return _Rows(value, unscaled, rank_input, excess)
        if not self.is_routed:  # the update is in the base's output
            value = output
        elif piece.owns_rows:
            value = output.addmm_(rank_input, lora_B)
        else:
            value = plus_product(output, rank_input, lora_B)
        return _Rows(value, value, rank_input)


@fused_on_accelerators
def _forward(
    like: Tensor,
    block: _Block,
    tensors: Mapping[str, Any],
    keep_slots: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the hidden states, and the rank-space input of the down update, weighted and not."""
    slots = block.slots
    projections = block.projections(tensors)
    down_A = tensors["down_A"]
    slot_weights = slots.by_place(tensors["slot_weights"])
    total = Total(slots, block.width, like)
    apart = like.new_empty(slots.experts.numel(), block.width) if slots.apart else None
    # Both are kept, as they are narrow: a weight, which may be 0, can't be divided out again.
    unweighted: Any = None
    weighted: Any = None
    if down_A is not None:
        unweighted = weighted = slots.new_rank_space(like)
        if slot_weights is not None:
            weighted = torch.zeros_like(unweighted)
    for piece in slots.pieces(block.width, like.dtype):
        rows = [projection.rows(piece) for projection in projections]
        states = block.gating(*(row.value for row in rows))
        weight = None if slot_weights is None else piece.take_slots(slot_weights)
        if down_A is not None and piece.columns is not None:
            dropped = piece.drop(states, keep_slots)
            down_rank = block.scale(piece.keep_rank(dropped @ piece.of_experts(down_A).T))
            piece.add_rank(unweighted, down_rank)
            if weight is not None:
                piece.add_rank(weighted, down_rank * weight)
        if apart is not None:
            piece.take_slots(apart).copy_(states)
        elif weight is not None and piece.owns_rows:
            total.add(piece, states.mul_(weight))
        else:
            total.add(piece, states, weight)
    return total.value if apart is None else apart, weighted, unweighted


@fused_on_accelerators
def _backward(
    grad_hidden: Tensor,
    grad_down: Tensor,
    block: _Block,
    tensors: Mapping[str, Any],
    keep_slots: Sequence[Tensor | None],
    unweighted: Tensor | None,
) -> dict[str, Tensor | None]:
    """Return the gradients by the names of the tensors."""
    backward = _Backward(block, tensors, keep_slots, unweighted)
    for piece in block.slots.pieces(block.width, grad_hidden.dtype):
        backward.accumulate(piece, grad_hidden, grad_down)
    return backward.gradients()


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
    def forward(ctx, block, draw_slots, *inputs):
        # Segments are views of one tensor: with its version counter, each one's update would
        # invalidate what the others have saved.
        tensors = block.by_name(without_graph(inputs))
        for projection in block.projections(tensors):
            projection.add_update_()
        keep_slots = [draw_mask(draw) for draw in draw_slots]
        hidden, weighted, unweighted = _forward(tensors["output 0"], block, tensors, keep_slots)
        ctx.block = block
        ctx.draw_slots = draw_slots
        ctx.save_for_backward(*tensors.values(), unweighted)
        return hidden, hidden.new_empty(0) if weighted is None else weighted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_down):
        *inputs, unweighted = ctx.saved_tensors
        block = ctx.block
        tensors = block.by_name(inputs)
        keep_slots = [draw_mask(draw) for draw in ctx.draw_slots]
        gradients = _backward(grad_hidden, grad_down, block, tensors, keep_slots, unweighted)
        return None, None, *(gradients.get(name) for name in block.names)


class _Backward:
    """Gradients of the function's tensors, summed up over pieces."""

    def __init__(
        self,
        block: _Block,
        tensors: Mapping[str, Any],
        keep_slots: Sequence[Tensor | None],
        unweighted: Any,
    ):
        self._block = block
        self._unweighted = unweighted
        self._projections = block.projections(tensors)
        self._keep_slots = keep_slots
        self._down_A: Any = tensors["down_A"]
        low_rank, slot_weights = tensors["low_rank"], tensors["slot_weights"]
        self._grad_low_rank = None if low_rank is None else torch.zeros_like(low_rank)
        self._grads = [
            _Gradients(projection, self._grad_low_rank, block.slots)
            for projection in self._projections
        ]
        self._grad_down_A: Any = None
        self._adapts_down = self._down_A is not None
        if self._adapts_down:
            self._grad_down_A = zeros_for_gradient(self._down_A)
        self._slot_weights = block.slots.by_place(slot_weights)
        self._grad_slot_weights: Any = None
        if slot_weights is not None:
            self._grad_slot_weights = torch.empty_like(self._slot_weights)

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients by the names of the function's tensors."""
        gradients = {
            "low_rank": self._grad_low_rank,
            "down_A": self._grad_down_A,
            "slot_weights": self._block.slots.by_token(self._grad_slot_weights),
        }
        for number, grads in enumerate(self._grads):
            gradients[f"output {number}"] = grads.output
            gradients[f"B {number}"] = grads.lora_B
            gradients[f"row_scale {number}"] = grads.row_scale
        return gradients

    def accumulate(self, piece: Piece, grad_hidden: Tensor, grad_down: Tensor) -> None:
        rows = [projection.rows(piece) for projection in self._projections]
        values = [row.value for row in rows]
        states, vector_jacobian = gate_with_gradients(self._block.gating, values)
        grad_states = self._grad_states(piece, grad_hidden, grad_down, states)
        for grads, row, grad in zip(self._grads, rows, vector_jacobian(grad_states), strict=True):
            grads.add(piece, row, grad)

    def _grad_states(
        self, piece: Piece, grad_hidden: Tensor, grad_down: Tensor, states: Tensor
    ) -> Tensor:
        """Gradient of the hidden states; adds to those of the routing weights and down's A."""
        if self._block.slots.apart:
            upstream = piece.take_slots(grad_hidden)
        else:
            upstream = piece.take(grad_hidden)
        is_adapted = self._adapts_down and piece.columns is not None
        grad_rank: Any = piece.take_rank(grad_down) if is_adapted else None
        is_weighted = self._slot_weights is not None
        if is_weighted:
            weight = piece.take_slots(self._slot_weights)
            grad_weight = (upstream * states).sum(-1, keepdim=True)
            if is_adapted:
                grad_weight += (grad_rank * piece.take_rank(self._unweighted)).sum(-1, keepdim=True)
                grad_rank = grad_rank * weight
            piece.take_slots(self._grad_slot_weights).copy_(grad_weight)
            # Slots don't stay apart where they are weighted here, so that `take` took the rows.
            upstream = upstream.mul_(weight) if piece.owns_rows else upstream * weight
        if not is_adapted:
            return upstream
        grad_rank = self._block.scale(grad_rank)
        dropped = piece.drop(states, self._keep_slots)
        down_A = piece.of_experts(self._down_A)
        add_product_over_tokens_(piece.of_experts(self._grad_down_A), grad_rank, dropped)
        if dropped is not states:
            return upstream + piece.drop(grad_rank @ down_A, self._keep_slots)
        if is_weighted and piece.owns_rows:
            return upstream.addmm_(grad_rank, down_A)
        return plus_product(upstream, grad_rank, down_A)


class _Gradients:
    """Gradients of an input projection's tensors."""

    def __init__(self, projection: _Projection, grad_low_rank: Any, slots: Slots):
        self._output = Total(slots, projection.output.shape[1], projection.output)
        self._rank: Any = None
        self.row_scale: Any = None
        if projection.row_scale is not None:
            self.row_scale = zeros_for_gradient(projection.row_scale)
        if projection.low_rank is not None:
            grad_low_rank = grad_low_rank[:, projection.side.columns]
            self._rank = RankGradients(projection.lora_B, grad_low_rank)

    @property
    def output(self) -> Tensor:
        return self._output.value

    @property
    def lora_B(self) -> Tensor | None:
        return None if self._rank is None else self._rank.lora_B

    def add(self, piece: Piece, rows: _Rows, grad: Tensor) -> None:
        if rows.excess is not None:
            piece.add_row_scale(self.row_scale, grad * rows.unscaled)
            grad = torch.addcmul(grad, rows.excess, grad)
        self._output.add(piece, grad)
        if rows.rank_input is not None:
            self._rank.add(piece, rows.rank_input, grad)
