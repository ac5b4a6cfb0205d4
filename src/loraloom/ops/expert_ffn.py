"""The FFN block of one adapter's tokens: the specification, in plain PyTorch.

Axes: T tokens, D hidden, F feed-forward, K top_k, E experts, R rank, S = E·R, P = S for each
input projection that has its own A.

`h_j = gating(gate + Δgate_e(j), up + Δup_e(j))` for slot j, `y = Σ_j g_j Down_e(j)(h_j)`, where
gating is `act(gate) ∘ up`, or another function of what the block's input projections make. The
down-projection of the frozen base is linear, so `Σ_j g_j W_d h_j = W_d Σ_j g_j h_j`: the base sees
T rows whatever K is, unless a DoRA on it scales its rows for each expert.
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

    @property
    def apart(self) -> bool:
        """Whether each slot goes through the base's output projection by itself."""
        return self.down is not None and self.down.row_scale is not None

    @property
    def is_plain(self) -> bool:
        """Whether nothing lies between A and B, and all projections have the same columns."""
        if any(side.between is not None for side in self.sides):
            return False
        return len({len(side.B) for side in self.sides}) == 1

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

    low_rank = _down_project(hidden_states, weights.input_A, dropout.keep_input, dropout)
    rank_inputs = [_rank_input(side, low_rank, hidden_states, tokens) for side in weights.inputs]
    slots = _slots_of(routing, weights, outputs[0].dtype)
    states = []  # h_j, K times (T, F)
    for slot in slots:
        adapted = [
            _adapted(output, rank_input, side, slot)
            for output, rank_input, side in zip(outputs, rank_inputs, weights.inputs, strict=True)
        ]
        states.append(gating(*adapted))
    down_inputs = []  # h_j A_dᵀ, K times (T, S)
    for hidden, keep in zip(states, dropout.keep_slots, strict=True):
        low_rank = _down_project(hidden, weights.down_A, keep, dropout)
        down_inputs.append(_rank_input(weights.down, low_rank, hidden, tokens))
    if routing is None:
        return states[0], lambda output: apply_update(output, down_inputs[0], weights.down)
    slot_weights = routing.routing_weights.to(outputs[0].dtype).T.unsqueeze(-1)  # (K, T, 1)

    def combine_adapted(outputs: Sequence[Tensor]) -> Tensor:
        adapted = [
            _adapted(output, down_input, weights.down, slot)
            for output, down_input, slot in zip(outputs, down_inputs, slots, strict=True)
        ]
        return combine_slots(adapted, slot_weights)

    if weights.apart:
        return torch.cat(states), lambda output: combine_adapted(output.chunk(len(slots)))

    def add_updates(output: Tensor) -> Tensor:
        # The update is linear too, so that the output is added once.
        zeros = torch.zeros_like(output)
        return output + combine_adapted([zeros for _ in slots])

    return combine_slots(states, slot_weights), add_updates


@dataclass(frozen=True)
class _Slot:
    """Who computes the tokens of one slot."""

    experts: Tensor  # [T]; -1 for the base's own output
    mask: Tensor  # 1 at the columns of a token's expert, [T, S]


def _slots_of(
    routing: Routing | None, weights: FfnWeights, dtype: torch.dtype
) -> Sequence[_Slot | None]:
    if routing is None:
        return [None]
    experts = routing.selected_experts
    masks = slot_masks(experts, weights.num_experts, weights.rank, dtype)
    return [_Slot(*slot) for slot in zip(experts.T, masks, strict=True)]


def _down_project(
    values: Tensor, lora_A: Tensor | None, keep: Tensor | None, dropout: FfnDropout
) -> Tensor | None:
    return None if lora_A is None else down_project(values, lora_A, keep, dropout.probability)


def _rank_input(
    side: UpProjection | None, low_rank: Tensor | None, values: Tensor, tokens: Any
) -> Tensor | None:
    if side is None or low_rank is None:
        return None
    return side.rank_input(low_rank, values, tokens)


def _adapted(
    output: Tensor, rank_input: Tensor | None, side: UpProjection | None, slot: _Slot | None
) -> Tensor:
    """Add a slot's update; expert -1 leaves the base's output."""
    if side is None or rank_input is None or slot is None:
        return apply_update(output, rank_input, side)
    update = (rank_input * slot.mask) @ side.B
    if side.row_scale is None:
        return output + update
    row_scale = side.row_scale[slot.experts.clamp_min(0)]
    decomposed = decompose(output, update, row_scale, side.bias)
    return torch.where((slot.experts >= 0).unsqueeze(-1), decomposed, output)


def combine_slots(slots: Sequence[Tensor], slot_weights: Tensor | Sequence[Tensor]) -> Tensor:
    """Compute Σ_j g_j x_j of the slots' values; weights are K times [T, 1]."""
    total = slots[0] * slot_weights[0]
    for values, weight in zip(slots[1:], slot_weights[1:], strict=True):
        total = torch.addcmul(total, values, weight)
    return total
