"""The FFN block of one adapter's tokens: the specification, in plain PyTorch.

Axes: T tokens, D hidden, F feed-forward, K top_k, E experts, R rank, S = E·R, P = S for each
input projection that has its own A.

`h_j = gating(gate + Δgate_e(j), up + Δup_e(j))` for slot j, `y = Σ_j g_j Down_e(j)(h_j)`, where
gating is `act(gate) ∘ up`, or another function of what the block's input projections make. The
down-projection of the frozen base is linear, so `Σ_j g_j W_d h_j = W_d Σ_j g_j h_j`: the base sees
T rows whatever K is, unless a DoRA on it scales its rows for each expert or it rounds rows.
`lean_expert_ffn.py` (training, long prompts) and `stacked.py` (decoding) compute the same.

Source: Li et al. 2024, MixLoRA, arXiv:2404.15159, eq. 4-7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraloom.ops.gating import Gating
from loraloom.ops.low_rank import UpProjection, apply_update, decompose, down_project, slot_masks


@dataclass(frozen=True)
class FfnWeights:
    """An adapter's weights in one FFN block, in compute form; None where nothing is adapted."""

    input_A: Tensor | None  # of the input projections stacked, [P, D]
    inputs: Sequence[UpProjection | None]  # one for each input projection, as gate and up
    down_A: Tensor | None  # [S, F]
    down: UpProjection | None
    num_experts: int
    rank: int
    width: int  # F
    # Whether the base's output projection is linear over rows, so that slots may be added up in
    # front of it. LLM.int8's is not: it rounds each row by its largest value.
    base_combines: bool = True

    @property
    def apart(self) -> bool:
        """Whether each slot goes through the base's output projection by itself."""
        return (self.down is not None and self.down.row_scale is not None) or not self.base_combines

    @property
    def is_plain(self) -> bool:
        """Whether nothing lies between A and B, and all projections have the same columns."""
        sizes = {len(part.B) for part in self.sides}
        return all(part.between is None for part in self.sides) and len(sizes) == 1

    @property
    def sides(self) -> Sequence[UpProjection]:
        return [side for side in (*self.inputs, self.down) if side is not None]

    def scaled(self, scale: float) -> FfnWeights:
        """Return the weights of every projection's update times a scale; see `scale_update`."""
        if scale == 1:
            return self
        inputs = [None if side is None else side.scaled(scale) for side in self.inputs]
        down = None if self.down is None else self.down.scaled(scale)
        return replace(self, inputs=inputs, down=down)


@dataclass(frozen=True)
class Routing:
    """Who computes each token."""

    selected_experts: Tensor  # [T, K]; -1 gives the base's own output (padding)
    # g, [T, K]; if they don't sum to one, the caller counts the output projection's bias so often.
    routing_weights: Tensor

    @property
    def top_k(self) -> int:
        return self.selected_experts.shape[1]


@dataclass(frozen=True)
class FfnDropout:
    """Masks of the block's dropout: one for its input, one for each slot's hidden states."""

    probability: float
    keep_input: Tensor | None
    keep_slots: Sequence[Tensor | None]

    @property
    def scale(self) -> float:
        return 1 / (1 - self.probability)

    @staticmethod
    def none(top_k: int) -> FfnDropout:
        return FfnDropout(0.0, None, [None] * top_k)


def expert_ffn(
    hidden_states: Tensor,
    outputs: Sequence[Tensor],
    weights: FfnWeights,
    routing: Routing | None,
    gating: Gating,
    dropout: FfnDropout,
    tokens: Any = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute the rows that the base's down-projection has to see, and what to do with its output.

    Outputs are those of the base's input projections, bias included, as gate and up, [T, F]. The
    rows are [T, F], or [K·T, F] where slots stay apart; the function makes of the base's output for
    them the block's, [T, D]. Without routing all tokens have one expert, and what lies between its
    A and B is computed of `tokens`.
    """
    # Plain autograd: h is kept for the backward pass, since a router of the output projection reads
    # it. Where nothing lies between A and B, `lean_expert_ffn` needs less memory.
    low_rank = None
    if weights.input_A is not None:
        keep = dropout.keep_input
        low_rank = down_project(hidden_states, weights.input_A, keep, dropout.probability)

    def rank_input(side: UpProjection | None) -> Tensor | None:
        if side is None or low_rank is None:
            return None
        return side.rank_input(low_rank, hidden_states, tokens)

    dtype = outputs[0].dtype
    rank_inputs = [rank_input(side) for side in weights.inputs]
    by_slot: Sequence[Any] = [None]
    if routing is not None:
        experts = routing.selected_experts
        masks = slot_masks(experts, weights.num_experts, weights.rank, dtype)
        by_slot = list(zip(masks, experts.T, strict=True))
    slots = []
    for slot in by_slot:
        inputs = zip(outputs, rank_inputs, weights.inputs, strict=True)
        slots.append(gating(*(_adapted(*projection, slot) for projection in inputs)))
    down, down_ranks = weights.down, [None] * len(slots)
    if down is not None and weights.down_A is not None:
        projected = [
            (hidden, down_project(hidden, weights.down_A, keep, dropout.probability))
            for hidden, keep in zip(slots, dropout.keep_slots, strict=True)
        ]
        down_ranks = [down.rank_input(rank, hidden, tokens) for hidden, rank in projected]
    if routing is None:
        return slots[0], lambda output: apply_update(output, down_ranks[0], down)
    slot_weights = routing.routing_weights.to(dtype).T.unsqueeze(-1)  # (K, T, 1)

    def finish(output: Tensor) -> Tensor:
        if weights.apart:
            outputs = output.chunk(len(slots))
        else:  # the update is linear too, and has the output added once
            outputs = [torch.zeros_like(output)] * len(slots)
        rows = [
            _adapted(rows, down_rank, down, slot)
            for rows, down_rank, slot in zip(outputs, down_ranks, by_slot, strict=True)
        ]
        combined = combine_slots(rows, slot_weights)
        return combined if weights.apart else output + combined

    return torch.cat(slots) if weights.apart else combine_slots(slots, slot_weights), finish


def _adapted(
    output: Tensor,
    rank_input: Tensor | None,
    side: UpProjection | None,
    slot: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Add a slot's update; expert -1 leaves the base's output."""
    if side is None or rank_input is None or slot is None:
        return apply_update(output, rank_input, side)
    mask, experts = slot
    update = (rank_input * mask) @ side.B
    if side.row_scale is None:
        return output + update
    scaled = decompose(output, update, side.row_scale[experts.clamp_min(0)], side.bias)
    return torch.where((experts >= 0).unsqueeze(-1), scaled, output)


def combine_slots(slots: Sequence[Tensor], slot_weights: Tensor | Sequence[Tensor]) -> Tensor:
    """Compute Σ_j g_j x_j of the slots' values; weights are K times [T, 1]."""
    total = slots[0] * slot_weights[0]
    for values, weight in zip(slots[1:], slot_weights[1:], strict=True):
        total = torch.addcmul(total, values, weight)
    return total
