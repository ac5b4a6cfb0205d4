"""The FFN block of one adapter's tokens in the memory of a plain LoRA.

Axes: T tokens, D hidden, F feed-forward, K top_k, E experts, R rank, S = E·R, P columns of the
input product.

The same numbers as `expert_ffn.py`, whose `expert_ffn` is this file's semantics. Kept for the
backward pass: the block's input, the base's gate and up, the rank-space activations and the
routing. The hidden states of the slots, K·T·F wide, are computed again. Tokens go through in
blocks small enough that a block's hidden states stay in the processor's cache.

Numerics: products and sums over slots run in the dtype of `gate` (matrix products accumulate in
float32 inside); gradients of weights are summed over blocks in float32 or better.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.dropout import apply_keep_mask
from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, Routing, combine_slots
from loraloom.ops.low_rank import UpProjection, decompose, down_project, slot_masks

_BLOCK_BYTES = 1 << 21


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
        Hidden rows ([T, F], or [K·T, F] with a DoRA on down) and a function from the base's output
        for them to the block's output, [T, D].
    """
    low_rank = None
    if weights.input_A is not None:
        low_rank = down_project(
            hidden_states, weights.input_A, dropout.keep_input, dropout.probability
        )
    slots = _Slots(weights, routing, gate.dtype, len(gate))
    block = _Block(slots, _Side.of(weights.gate), _Side.of(weights.up), act, dropout)
    slot_weights = None
    if routing is not None and not slots.apart:
        slot_weights = routing.routing_weights.to(gate.dtype)
    hidden, down_rank = _LeanFfn.apply(  # pyright: ignore[reportGeneralTypeIssues]
        block,
        gate,
        up,
        low_rank,
        *_tensors(weights.gate),
        *_tensors(weights.up),
        None if weights.down is None else weights.down.A,
        slot_weights,
    )
    return hidden, _finish(weights, routing, slots, down_rank)


def _tensors(side: UpProjection | None) -> tuple[Tensor | None, Tensor | None]:
    """Return what of a projection has gradients: B, and DoRA's row scale."""
    return (None, None) if side is None else (side.B, side.row_scale)


def _finish(
    weights: FfnWeights, routing: Routing | None, slots: _Slots, down_rank: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return what is to be done with the base's down-projection of the hidden rows."""
    down = weights.down
    if down is None:
        return lambda output: output
    if down.row_scale is None:
        return lambda output: torch.addmm(output, down_rank, down.B)
    row_scale = _with_unit_row(down.row_scale)

    def finish(output: Tensor) -> Tensor:
        outputs = []
        for slot, rows in enumerate(output.chunk(slots.num_slots)):
            update = _masked(down_rank, slots.mask(slot, slice(None))) @ down.B
            scale = row_scale[slots.experts[slot]]
            outputs.append(decompose(rows, update, scale, weights.down_bias))
        if routing is None:
            return outputs[0]
        return combine_slots(outputs, routing.routing_weights.to(output.dtype).T.unsqueeze(-1))

    return finish


class _Slots:
    """Which expert each slot of a token uses, as masks over the experts' ranks."""

    def __init__(
        self, weights: FfnWeights, routing: Routing | None, dtype: torch.dtype, num_tokens: int
    ):
        down = weights.down
        self.apart = down is not None and down.row_scale is not None
        self.rank = weights.rank
        self.num_slots = 1 if routing is None else routing.top_k
        self.masks: Tensor | None = None
        self.num_experts = weights.num_experts
        self.routed = routing is not None
        self.dtype = dtype
        if routing is None:
            device = weights.any_tensor().device
            self.experts = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
        else:
            self.experts = routing.selected_experts.T
            self.masks = slot_masks(
                routing.selected_experts, weights.num_experts, weights.rank, dtype
            )

    def with_experts(self, experts: Any) -> _Slots:
        """Return these slots with their masks made anew, or without any tensors."""
        slots = copy.copy(self)
        slots.experts, slots.masks = experts, None
        if self.routed and experts is not None:
            slots.masks = slot_masks(experts.T, self.num_experts, self.rank, self.dtype)
        return slots

    def mask(self, slot: int, block: slice) -> Tensor | None:
        """1 at the columns of a slot's expert, [t, S]; None when there is but one expert."""
        return None if self.masks is None else self.masks[slot, block]

    def one_hot(self, slot: int, block: slice, like: Tensor) -> Tensor:
        """1 at a slot's expert, [t, E]."""
        mask = self.mask(slot, block)
        return like.new_ones(len(like), 1) if mask is None else mask[:, :: self.rank]


@dataclass(frozen=True)
class _Side:
    """An input projection: its columns of the input product and its bias."""

    columns: slice
    bias: Tensor | None

    @staticmethod
    def of(projection: UpProjection | None) -> _Side:
        if projection is None:
            return _Side(slice(0, 0), None)
        return _Side(projection.columns, projection.bias)


@dataclass(frozen=True)
class _Block:
    """What the function needs besides tensors that have gradients."""

    slots: _Slots
    gate: _Side
    up: _Side
    act: Activation
    dropout: FfnDropout

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Choices and masks, which autograd is to save: checkpointing drops only what it sees."""
        return self.slots.experts, *self.dropout.keep_slots

    def without_tensors(self) -> _Block:
        dropout = replace(self.dropout, keep_input=None, keep_slots=())
        return replace(self, slots=self.slots.with_experts(None), dropout=dropout)

    def with_tensors(self, experts: Tensor, *keep_slots: Tensor | None) -> _Block:
        dropout = replace(self.dropout, keep_slots=keep_slots)
        return replace(self, slots=self.slots.with_experts(experts), dropout=dropout)

    def drop(self, values: Tensor, slot: int, block: slice) -> Tensor:
        keep = self.dropout.keep_slots[slot]
        if keep is None:
            return values
        return apply_keep_mask(values, keep[block])


@dataclass(frozen=True)
class _Projected:
    """An adapted input projection of one slot and block: before and after DoRA's row scale."""

    value: Tensor
    update: Tensor
    row_scale: Tensor | None


class _LeanFfn(torch.autograd.Function):
    """(gate, up, rank-space input) -> (Σ_j g_j h_j, rank-space input of the down update)."""

    @staticmethod
    def forward(ctx, block, gate, up, low_rank, gate_B, gate_c, up_B, up_c, down_A, slot_weights):
        ctx.block = block.without_tensors()
        forward = _SlotForward(block, gate, up, low_rank, gate_B, gate_c, up_B, up_c)
        slots = block.slots
        tokens, features = gate.shape
        rows = slots.num_slots * tokens if slots.apart else tokens
        hidden = gate.new_empty(rows, features)
        unweighted: Any = None if down_A is None else gate.new_zeros(tokens, len(down_A))
        weighted = unweighted
        if down_A is not None and slot_weights is not None:
            weighted = gate.new_zeros(unweighted.shape)
        for part in _blocks(gate):
            for slot in range(slots.num_slots):
                states = forward.hidden(slot, part)[-1]
                weight = None if slot_weights is None else slot_weights[part, slot, None]
                if slots.apart:
                    hidden[slot * tokens :][part] = states
                elif slot == 0:
                    torch.mul(states, 1 if weight is None else weight, out=hidden[part])
                else:
                    hidden[part].addcmul_(states, weight)
                if down_A is None:
                    continue
                down = _masked(block.drop(states, slot, part) @ down_A.T, slots.mask(slot, part))
                down = down * block.dropout.scale if block.dropout.probability else down
                unweighted[part] += down
                if weight is not None:
                    weighted[part].addcmul_(down, weight)
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
        for part in _blocks(tensors[0]):
            for slot in range(block.slots.num_slots):
                backward.accumulate(slot, part, grad_hidden, grad_down)
        return None, *backward.gradients()


class _SlotForward:
    """The forward pass of one slot and block of tokens; with a graph over the activation alone."""

    def __init__(
        self, block, gate, up, low_rank, gate_B, gate_c, up_B, up_c, *, with_graph: bool = False
    ):
        self.block = block
        self.with_graph = with_graph
        self.gate, self.up, self.low_rank = gate, up, low_rank
        self.gate_B, self.up_B = gate_B, up_B
        self.gate_c = None if gate_c is None else _with_unit_row(gate_c).to(gate.dtype)
        self.up_c = None if up_c is None else _with_unit_row(up_c).to(gate.dtype)

    def hidden(
        self, slot: int, part: slice
    ) -> tuple[Tensor | None, _Projected, Tensor, _Projected | None, Tensor]:
        """Compute a slot's hidden states.

        Returns:
            The masked rank-space input; the gate before (a leaf) and after the activation, the
            adapted up; and the hidden states.
        """
        slots = self.block.slots
        masked = None
        if self.low_rank is not None:
            masked = _mask_columns(self.low_rank[part], slots.mask(slot, part))
        experts = slots.experts[slot, part]
        inner = _project(
            self.gate[part], masked, self.block.gate, self.gate_B, self.gate_c, experts
        )
        with torch.set_grad_enabled(self.with_graph):
            leaf = inner.value.detach().requires_grad_(self.with_graph)
            activated = self.block.act(leaf)
        inner = _Projected(leaf, inner.update, inner.row_scale)
        if self.up is None:
            return masked, inner, activated, None, activated.detach()
        outer = _project(self.up[part], masked, self.block.up, self.up_B, self.up_c, experts)
        return masked, inner, activated, outer, activated.detach() * outer.value


class _Backward:
    """Gradients of the function's tensors, summed up over slots and blocks."""

    def __init__(
        self, block: _Block, tensors: Any, down_A: Any, slot_weights: Any, unweighted: Any
    ):
        gate, up, low_rank, gate_B, gate_c, up_B, up_c = tensors
        self.block = block
        self.forward = _SlotForward(block, *tensors, with_graph=True)
        self.down_A, self.slot_weights, self.unweighted = down_A, slot_weights, unweighted
        self.grad_gate = torch.empty_like(gate)
        self.grad_up: Any = None if up is None else torch.empty_like(up)
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

    def accumulate(self, slot: int, part: slice, grad_hidden: Tensor, grad_down: Tensor) -> None:
        """Add a slot's and block's share."""
        masked, inner, activated, outer, states = self.forward.hidden(slot, part)
        grad_states = self._grad_states(slot, part, grad_hidden, grad_down, states)
        grad_activated = grad_states if outer is None else grad_states * outer.value
        grad_inner = torch.autograd.grad(activated, inner.value, grad_activated)[0]
        one_hot = lambda: self.block.slots.one_hot(slot, part, states)  # noqa: E731
        grad_inner = _unscale(grad_inner, inner, self.grad_gate_c, one_hot)
        _add_slot(self.grad_gate, part, slot, grad_inner)
        self._backproject(
            slot, part, grad_inner, masked, self.block.gate, self.forward.gate_B, self.grad_gate_B
        )
        if outer is None:
            return
        grad_outer = _unscale(grad_states * activated.detach(), outer, self.grad_up_c, one_hot)
        _add_slot(self.grad_up, part, slot, grad_outer)
        self._backproject(
            slot, part, grad_outer, masked, self.block.up, self.forward.up_B, self.grad_up_B
        )

    def _grad_states(
        self, slot: int, part: slice, grad_hidden: Tensor, grad_down: Tensor, states: Tensor
    ) -> Tensor:
        """Gradient of a slot's hidden states; adds to those of the routing weights and down's A."""
        if self.block.slots.apart:
            grad_hidden = grad_hidden[slot * len(self.grad_gate) :]
        grad_states = upstream = grad_hidden[part]
        weight = None
        if self.slot_weights is not None:
            weight = self.slot_weights[part, slot, None]
            grad_states = upstream * weight
            self.grad_weights[part, slot] = (upstream * states).sum(-1)
        if self.down_A is None:
            return grad_states
        grad_rank = _masked(grad_down[part], self.block.slots.mask(slot, part))
        if weight is not None:
            self.grad_weights[part, slot] += (grad_rank * self.unweighted[part]).sum(-1)
            grad_rank = grad_rank * weight
        if self.block.dropout.probability:
            grad_rank = grad_rank * self.block.dropout.scale
        self.grad_down_A += grad_rank.T @ self.block.drop(states, slot, part)
        if self.block.dropout.keep_slots[slot] is None:
            return torch.addmm(grad_states, grad_rank, self.down_A)
        return grad_states + self.block.drop(grad_rank @ self.down_A, slot, part)

    def _backproject(
        self,
        slot: int,
        part: slice,
        grad: Tensor,
        masked: Any,
        side: _Side,
        lora_B: Any,
        grad_B: Any,
    ) -> None:
        """Add a block's part to the gradients of B and of the rank-space input."""
        if lora_B is None:
            return
        grad_B += masked[:, side.columns].T @ grad
        mask = self.block.slots.mask(slot, part)
        self.grad_low_rank[part, side.columns] += _masked(grad @ lora_B.T, mask)


def _blocks(gate: Tensor) -> Iterator[slice]:
    """Split T into ranges of tokens; one range on an accelerator."""
    tokens, features = gate.shape
    step = tokens
    if gate.device.type == "cpu":
        step = max(64, _BLOCK_BYTES // (features * gate.element_size()) // 32 * 32)
    for start in range(0, tokens, max(step, 1)):
        yield slice(start, min(start + step, tokens))


def _project(
    output: Tensor,
    masked: Tensor | None,
    side: _Side,
    lora_B: Tensor | None,
    row_scale: Tensor | None,
    experts: Tensor,
) -> _Projected:
    """Adapt a block of the base's output; a missing B stands for nothing adapted."""
    if lora_B is None or masked is None:
        return _Projected(output, output, None)
    if row_scale is None:
        value = torch.addmm(output, masked[:, side.columns], lora_B)
        return _Projected(value, value, None)
    unbiased = output if side.bias is None else output - side.bias
    update = torch.addmm(unbiased, masked[:, side.columns], lora_B)
    scale = row_scale[experts]
    value = scale * update
    return _Projected(value if side.bias is None else value + side.bias, update, scale)


def _unscale(
    grad: Tensor, projected: _Projected, grad_c: Tensor | None, one_hot: Callable[[], Tensor]
) -> Tensor:
    """Go back through DoRA's row scale, adding to its gradient."""
    if projected.row_scale is None or grad_c is None:
        return grad
    grad_c += one_hot().T @ (grad * projected.update)
    return grad * projected.row_scale


def _with_unit_row(row_scale: Tensor) -> Tensor:
    """Append a row of ones, which expert -1 (padding) indexes."""
    return torch.cat([row_scale, torch.ones_like(row_scale[:1])])


def _zeros(tensor: Tensor | None) -> Tensor | None:
    """Room for a gradient in float32 or better."""
    if tensor is None:
        return None
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _mask_columns(low_rank: Tensor, mask: Tensor | None) -> Tensor:
    """Mask each projection's S columns of the input product."""
    if mask is None:
        return low_rank
    groups = low_rank.unflatten(1, (-1, mask.shape[1]))  # (t, P/S, S)
    return (groups * mask.unsqueeze(1)).flatten(1)


def _add_slot(total: Tensor, part: slice, slot: int, values: Tensor) -> None:
    if slot == 0:
        total[part] = values
    else:
        total[part] += values
