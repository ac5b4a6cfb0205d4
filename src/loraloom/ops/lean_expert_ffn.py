"""The FFN block of one adapter's tokens in the memory of a plain LoRA.

Axes: T tokens, D hidden, F feed-forward, K top_k, S = E·R, P columns of the input product.

Same numbers as `expert_ffn.py` (its `expert_ffn` is this file's semantics) for weights without
DoRA. Kept for the backward pass: the block's input, the base's gate and up, the rank-space
activations and the routing. The hidden states of the slots, K·T·F wide, are computed again. Tokens
go through in blocks small enough that a block's hidden states stay in the processor's cache.

Numerics: products and sums over slots run in the dtype of `gate` (matrix products accumulate in
float32 inside); gradients of weights are accumulated over blocks in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loraloom.ops.dropout import apply_keep_mask
from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, Routing
from loraloom.ops.low_rank import down_project, slot_masks

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
        weights: The adapter's weights, without DoRA.
        routing: Slots of each token; None for a plain LoRA (one expert with weight 1).
        act: The base's activation.
        dropout: Masks.

    Returns:
        Hidden rows [T, F] and a function from the base's output for them to the block's output.
    """
    low_rank = None
    if weights.input_A is not None:
        low_rank = down_project(
            hidden_states, weights.input_A, dropout.keep_input, dropout.probability
        )
    plan = _Plan(weights, routing, act, dropout, gate.dtype)
    hidden, down_rank = _LeanFfn.apply(  # pyright: ignore[reportGeneralTypeIssues]
        plan,
        gate,
        up,
        low_rank,
        None if weights.gate is None else weights.gate.B,
        None if weights.up is None else weights.up.B,
        None if weights.down is None else weights.down.A,
        None if routing is None else routing.routing_weights.to(gate.dtype),
    )
    if weights.down is None:
        return hidden, lambda output: output
    down_B = weights.down.B
    return hidden, lambda output: torch.addmm(output, down_rank, down_B)


class _Plan:
    """What the function needs besides tensors that have gradients."""

    def __init__(
        self,
        weights: FfnWeights,
        routing: Routing | None,
        act: Activation,
        dropout: FfnDropout,
        dtype: torch.dtype,
    ):
        self.act = act
        self.dropout = dropout.probability
        self.keep_slots = list(dropout.keep_slots)
        self.gate_columns = slice(0, 0) if weights.gate is None else weights.gate.columns
        self.up_columns = slice(0, 0) if weights.up is None else weights.up.columns
        self.masks: list[Tensor | None] = [None]
        if routing is not None:
            masks = slot_masks(routing.selected_experts, weights.num_experts, weights.rank, dtype)
            self.masks = list(masks)


def _blocks(gate: Tensor) -> Iterator[slice]:
    """Split T into ranges of tokens; one range on an accelerator."""
    tokens, features = gate.shape
    step = tokens
    if gate.device.type == "cpu":
        step = max(64, _BLOCK_BYTES // (features * gate.element_size()) // 32 * 32)
    for start in range(0, tokens, max(step, 1)):
        yield slice(start, min(start + step, tokens))


def _rows(values: Tensor | None, block: slice) -> Tensor | None:
    return None if values is None else values[block]


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _scaled(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


def _project(output: Tensor, low_rank: Tensor | None, columns: slice, lora_B: Tensor | None):
    """Add an update to a block of the base's output; None stands for nothing adapted."""
    if lora_B is None or low_rank is None:
        return output
    return torch.addmm(output, low_rank[:, columns], lora_B)


class _LeanFfn(torch.autograd.Function):
    """(gate, up, rank-space input) -> (Σ_j g_j h_j, rank-space input of the down update)."""

    @staticmethod
    def forward(ctx, plan, gate, up, low_rank, gate_B, up_B, down_A, slot_weights):
        hidden = torch.empty_like(gate)
        unweighted = None if down_A is None else gate.new_zeros(len(gate), len(down_A))
        weighted = unweighted
        if down_A is not None and slot_weights is not None:
            weighted = torch.zeros_like(unweighted)
        for block in _blocks(gate):
            for slot in range(len(plan.masks)):
                mask = _rows(plan.masks[slot], block)
                weight = None if slot_weights is None else slot_weights[block, slot, None]
                states = _slot_hidden(plan, gate, up, low_rank, gate_B, up_B, mask, block)[-1]
                if slot == 0:
                    hidden[block] = _scaled(states, weight)
                else:
                    hidden[block].addcmul_(states, weight)
                if down_A is None:
                    continue
                dropped = apply_keep_mask(
                    states, _rows(plan.keep_slots[slot], block), plan.dropout
                )
                down = _masked(dropped @ down_A.T, mask)
                unweighted[block] += down
                if weight is not None:
                    weighted[block].addcmul_(down, weight)
        ctx.plan = plan
        ctx.save_for_backward(
            gate, up, low_rank, gate_B, up_B, down_A, slot_weights, unweighted
        )
        if weighted is None:
            weighted = gate.new_empty(0)
            ctx.mark_non_differentiable(weighted)
        return hidden, weighted

    @staticmethod
    def backward(ctx, grad_hidden, grad_down):  # pyright: ignore
        gate, up, low_rank, gate_B, up_B, down_A, slot_weights, unweighted = ctx.saved_tensors
        plan = ctx.plan
        wide = torch.promote_types(gate.dtype, torch.float32)
        grad_gate = torch.empty_like(gate)
        grad_up = None if up is None else torch.empty_like(up)
        grad_low_rank = None if low_rank is None else torch.zeros_like(low_rank)
        grad_gate_B = None if gate_B is None else torch.zeros_like(gate_B, dtype=wide)
        grad_up_B = None if up_B is None else torch.zeros_like(up_B, dtype=wide)
        grad_down_A = None if down_A is None else torch.zeros_like(down_A, dtype=wide)
        grad_weights = None if slot_weights is None else torch.empty_like(slot_weights)
        for block in _blocks(gate):
            for slot in range(len(plan.masks)):
                mask = _rows(plan.masks[slot], block)
                weight = None if slot_weights is None else slot_weights[block, slot, None]
                masked, inner, activated, outer, states = _slot_hidden(
                    plan, gate, up, low_rank, gate_B, up_B, mask, block
                )
                grad_states = _scaled(grad_hidden[block], weight)
                grad_weight = None
                if grad_weights is not None:
                    grad_weight = (grad_hidden[block] * states).sum(-1)
                if down_A is not None:
                    keep = _rows(plan.keep_slots[slot], block)
                    grad_rank = _masked(grad_down[block], mask)
                    if grad_weight is not None:
                        grad_weight = grad_weight + (grad_rank * unweighted[block]).sum(-1)
                    grad_rank = _scaled(grad_rank, weight)
                    dropped = apply_keep_mask(states, keep, plan.dropout)
                    grad_down_A += grad_rank.T @ dropped
                    if keep is None:
                        grad_states = torch.addmm(grad_states, grad_rank, down_A)
                    else:
                        grad_states = grad_states + apply_keep_mask(
                            grad_rank @ down_A, keep, plan.dropout
                        )
                if grad_weights is not None:
                    grad_weights[block, slot] = grad_weight
                grad_activated = grad_states if outer is None else grad_states * outer
                grad_inner = torch.autograd.grad(activated, inner, grad_activated)[0]
                _accumulate(grad_gate, block, slot, grad_inner)
                if gate_B is not None:
                    _backproject(
                        grad_inner, masked, plan.gate_columns, gate_B, mask,
                        grad_gate_B, grad_low_rank[block],
                    )  # fmt: skip
                if outer is not None:
                    grad_outer = grad_states * activated.detach()
                    _accumulate(grad_up, block, slot, grad_outer)
                    if up_B is not None:
                        _backproject(
                            grad_outer, masked, plan.up_columns, up_B, mask,
                            grad_up_B, grad_low_rank[block],
                        )  # fmt: skip
        return (
            None, grad_gate, grad_up, grad_low_rank, grad_gate_B, grad_up_B, grad_down_A,
            grad_weights,
        )  # fmt: skip


def _slot_hidden(plan, gate, up, low_rank, gate_B, up_B, mask, block):
    """Compute a slot's hidden states for a block of tokens, with what the backward pass needs.

    Returns:
        The masked rank-space input, the gate before the activation (a leaf with gradient when
        gradients are wanted), after it, the adapted up, and the hidden states.
    """
    masked = None
    if low_rank is not None:
        masked = low_rank[block]
        if mask is not None:
            masked = _mask_columns(masked, mask)
    inner = _project(gate[block], masked, plan.gate_columns, gate_B)
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        activated = plan.act(inner)
    outer = None if up is None else _project(up[block], masked, plan.up_columns, up_B)
    states = activated.detach() if outer is None else activated.detach() * outer
    return masked, inner, activated, outer, states


def _mask_columns(low_rank: Tensor, mask: Tensor) -> Tensor:
    """Mask each projection's S columns of the input product."""
    groups = low_rank.unflatten(1, (-1, mask.shape[1]))  # (T, P/S, S)
    return (groups * mask.unsqueeze(1)).flatten(1)


def _accumulate(total: Tensor, block: slice, slot: int, values: Tensor) -> None:
    if slot == 0:
        total[block] = values
    else:
        total[block] += values


def _backproject(grad, masked, columns, lora_B, mask, grad_B, grad_low_rank) -> None:
    """Add a block's part to the gradients of B and of the rank-space input."""
    grad_B += masked[:, columns].T @ grad
    grad_low_rank[:, columns] += _masked(grad @ lora_B.T, mask)
