"""The FFN block of one adapter's tokens: its formula, its weights, and its plain computation.

Axes: T tokens, D hidden, F feed-forward, K top_k, E experts, R rank, S = E·R, P = S for each
input projection that has its own A, n rows.

`h_j = gating(gate + Δgate_e(j), up + Δup_e(j))` for slot j, `y = Σ_j g_j Down_e(j)(h_j)`, where
gating is `act(gate) ∘ up`, or another function of what the block's input projections make. The
down-projection of the frozen base is linear, so `Σ_j g_j W_d h_j = W_d Σ_j g_j h_j`: the base sees
T rows whatever K is, unless a DoRA on it scales its rows for each expert.
`lean_expert_ffn.py` (training, long prompts) and `stacked.py` (decoding) compute it.

Source: Li et al. 2024, MixLoRA, arXiv:2404.15159, eq. 4-7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from loraloom.ops.dropout import DrawMask
from loraloom.ops.gating import Gating
from loraloom.ops.low_rank import UpProjection, apply_update, down_project


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
    keep_input: DrawMask | None  # draws [T, D]
    keep_slots: Sequence[DrawMask | None]  # each draws [T, F]

    @property
    def scale(self) -> float:
        return 1 / (1 - self.probability)

    @staticmethod
    def none(top_k: int) -> FfnDropout:
        return FfnDropout(0.0, None, [None] * top_k)


class FfnRows(NamedTuple):
    """An adapter's half-done FFN block, waiting for the base's output projection."""

    hidden: Tensor  # rows to send through it, [n, F]
    finish: Callable[[Tensor], Tensor]
    """From its output for these, [n, D], to the block's, [T, D]; it may write to the output."""


def mapped_ffn(
    hidden_states: Tensor,
    outputs: Sequence[Tensor],
    weights: FfnWeights,
    gating: Gating,
    dropout: FfnDropout,
    tokens: Any,
) -> FfnRows:
    """Compute the block of an adapter that maps `tokens` between A and B, all with one expert.

    Outputs are those of the base's input projections, bias included, as gate and up, [T, F].
    """
    # Plain autograd: h is kept for the backward pass, since a router of the output projection reads
    # it. Where nothing lies between A and B, `lean_expert_ffn` needs less memory.

    def rank_inputs(
        values: Tensor,
        lora_A: Tensor | None,
        keep: DrawMask | None,
        sides: Sequence[UpProjection | None],
    ) -> list[Tensor | None]:
        if lora_A is None:
            return [None for _ in sides]
        low_rank = down_project(values, lora_A, keep, dropout.probability)
        return [
            None if side is None else side.rank_input(low_rank, values, tokens) for side in sides
        ]

    updates = rank_inputs(hidden_states, weights.input_A, dropout.keep_input, weights.inputs)
    hidden = gating(*map(apply_update, outputs, updates, weights.inputs))
    (update,) = rank_inputs(hidden, weights.down_A, dropout.keep_slots[0], [weights.down])
    return FfnRows(hidden, lambda output: apply_update(output, update, weights.down))
