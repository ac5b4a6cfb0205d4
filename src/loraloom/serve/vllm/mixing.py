"""The FFN block of tokens that belong to different folded adapters, without a loop over these.

Axes: T tokens, K slots of a token, C experts that there is room for, S rank that there is room for,
F feed-forward, L adapters.

Each token meets the weights of its own adapter alone. Plain LoRAs are mixtures of one expert, and
the base model's tokens pass unchanged: what an adapter is lies in tensors that the tokens look up,
so that nothing waits for the device, and graphs that were captured serve all adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loraloom.serve.vllm.folding import PIECES


class Choice(NamedTuple):
    """The experts of tokens."""

    columns: Bool[Tensor, "K T S"]
    weights: Float[Tensor, "K T 1"]


def choose(
    scores: Float[Tensor, "T S"],
    described: Float[Tensor, "L 2 S"],
    adapters: Int[Tensor, " T"],
    num_slots: int,
) -> Choice:
    """Choose each token's experts, as its own adapter's router does."""
    own = described.index_select(0, adapters.clamp_min(0)).float()  # (T, 2, S)
    num_experts, top_k = own[:, 1, 0, None], own[:, 1, 1, None]
    room = scores.shape[1] // PIECES
    logits = scores[:, : room * PIECES].unflatten(1, (room, PIECES)).sum(-1)  # (T, C)
    places = torch.arange(max(room, num_slots), device=scores.device)
    logits = logits.masked_fill(places[:room] >= num_experts, -torch.inf)
    best, selected = logits.topk(num_slots, dim=-1)
    weights = best.masked_fill(places[:num_slots] >= top_k, -torch.inf).softmax(-1)
    routed = num_experts > 0
    weights = torch.where(routed, weights, (places[:num_slots] == 0).float())
    experts = torch.where(routed, selected + 1, 0).T  # (K, T), counted from 1 as columns are
    columns = (own[:, 0] == experts.unsqueeze(-1)) & (adapters >= 0).unsqueeze(-1)
    return Choice(columns, weights.T.unsqueeze(-1))


def mix(
    gate_up: Float[Tensor, "T N"],
    low_rank: Float[Tensor, "P T S"],
    choice: Choice,
    expand: Callable[[Tensor, Tensor], Tensor],
    shrink: Callable[[Tensor], Tensor],
    act: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T S"]]:
    """Compute what the output projection and the B of its update multiply.

    Down-projection and mixing are linear, so slots are added up in front of both.
    """
    columns, weights = choice
    is_base = ~columns.any(-1).any(0).unsqueeze(-1)
    updated = expand(gate_up, torch.where(columns.unsqueeze(1), low_rank, 0.0))
    # zeros of the base's tokens may have met some adapter's weights, and these may be NaN
    states = act(torch.where(is_base, gate_up, updated).flatten(0, 1)).unflatten(
        0, (-1, len(gate_up))
    )
    rank_space = torch.where(columns, shrink(states), 0.0) * weights
    return (states * weights.to(states.dtype)).sum(0), rank_space.sum(0)
