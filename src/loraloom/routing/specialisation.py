"""What experts do: how much the choice of an expert says about the class of a token.

A class is whatever tokens are told apart by: the task or skill that they belong to, or whether they
begin a word.

Axes: C classes, N routers, T tokens, E experts (the most that a router has).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraloom.routing.record import LayerRouting
from loraloom.routing.statistics import load_shares


def loads_by_class(
    routing: Sequence[LayerRouting], classes: Int[Tensor, " T"], num_classes: int
) -> Float[Tensor, "C N E"]:
    """Add up each expert's load at each router over the tokens of each class, on the CPU."""
    num_experts = max(record.num_experts for record in routing)
    loads = torch.zeros(len(routing), num_classes * num_experts, dtype=torch.float64)
    for load, record in zip(loads, routing, strict=True):
        places = classes.unsqueeze(1) * num_experts + record.selected_experts.cpu()  # (T, K)
        load.scatter_add_(0, places.flatten(), record.shares.flatten().double().cpu())
    return loads.view(len(routing), num_classes, num_experts).transpose(0, 1)


def specialisation_bits(loads: Float[Tensor, "C N E"]) -> Float[Tensor, "C N"]:
    """Compute KL(p(e | c) ‖ p(e)) in bits: how far a class's load is from that of all tokens.

    It is 0 for a class whose tokens go where all tokens go, and at most log2(1 / p(c)).
    """
    of_class, of_all = load_shares(loads), load_shares(loads.sum(0))
    logs = torch.special.xlogy(of_class, of_class) - torch.special.xlogy(of_class, of_all)
    return (logs.sum(-1) / math.log(2)).clamp_min(0)


def mutual_information_bits(loads: Float[Tensor, "C N E"]) -> Float[Tensor, " N"]:
    """Compute I(expert; class) = Σ_c p(c) KL(p(e | c) ‖ p(e)) in bits, at each router.

    It is 0 where experts take tokens of all classes alike, and at most the entropy of the classes
    or of the experts, the smaller of the two.
    """
    return (load_shares(loads.sum(-1).T).T * specialisation_bits(loads)).sum(0)
