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
    """The experts of tokens.

    Args:
        columns: Those of the rank that belong to each slot's expert, [K, T, S].
        weights: Of each slot, [K, T, 1] float32; slots that a token doesn't have weigh 0.
    """

    columns: Bool[Tensor, "K T S"]
    weights: Float[Tensor, "K T 1"]


def choose(
    scores: Float[Tensor, "T S"],
    described: Float[Tensor, "L 2 S"],
    adapters: Int[Tensor, " T"],
    num_slots: int,
) -> Choice:
    """Choose each token's experts, as its own adapter's router does.

    Args:
        scores: x Aᵀ of the router's A (folding.router_pair), float32.
        described: The router's B of each adapter; zeros for those without a router.
        adapters: Of each token; -1 is the base model.
        num_slots: K, no less than any adapter's top_k.

    Returns:
        The softmax over the best top_k. A token without a router has one slot with all columns, one
        of the base model has no columns.
    """
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

    Args:
        gate_up: Base output of the input projections, side by side.
        low_rank: x Aᵀ of each of these (one that is fused has one A), float32.
        choice: Who computes each token.
        expand: From a base output, [T, N], and slots' rank space, [K, P, T, S], to the slots'
            outputs, [K, T, N].
        shrink: From slots' hidden states, [K, T, F], to their rank space, [K, T, S] float32.
        act: From gate and up side by side to hidden states.
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
