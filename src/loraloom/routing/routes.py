"""Routers' logits, and routes: from a token's logits to its experts, best first, and their weights.

Axes: T tokens, D hidden, E experts, K slots of a token, which weigh 0 where it uses fewer.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Routed = tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]


class Route(ABC):
    """What routers do with their logits; equal settings are equal."""

    sums_to_one: ClassVar[bool] = False
    """Whether a token's weights always sum to 1."""

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "T E"]) -> Routed:
        """Choose experts."""


@dataclass(frozen=True)
class TopK(Route):
    """The top_k most probable, renormalized to sum to 1 (MixLoRA, arXiv:2404.15159, eq. 5-6)."""

    top_k: int
    sums_to_one = True

    def __call__(self, logits: Float[Tensor, "T E"]) -> Routed:
        # Softmax keeps the order of the logits; its renormalized part is the softmax of that part.
        top_logits, selected = logits.topk(self.top_k, dim=-1)
        return selected, top_logits.softmax(-1)


@dataclass(frozen=True)
class TopP(Route):
    """The fewest experts whose probabilities sum to more than top_p, with these as weights.

    Source: MoE-PEFT 2.0.2, `mixlora-dynamic`; Huang et al. 2024, Harder Tasks Need More Experts,
    arXiv:2403.07652.
    """

    top_p: float  # 1 keeps all
    temperature: float = 1.0  # divides the logits
    divides_probabilities: bool = False  # in place of the logits, as MoE-PEFT does

    def __call__(self, logits: Float[Tensor, "T E"]) -> Routed:
        if self.divides_probabilities:
            probabilities = logits.softmax(-1) / self.temperature
        else:
            probabilities = (logits / self.temperature).softmax(-1)
        weights, selected = probabilities.sort(-1, descending=True)
        sums = weights.detach().cumsum(-1)
        sum_before = sums.roll(1, -1)
        sum_before[..., 0] = 0
        is_left_out = sum_before > self.top_p
        return selected, weights.masked_fill(is_left_out, 0)


@dataclass(frozen=True)
class Switch(Route):
    """The most probable, weighted by its probability (Fedus et al., arXiv:2101.03961, eq. 1-2)."""

    def __call__(self, logits: Float[Tensor, "T E"]) -> Routed:
        weights, selected = logits.softmax(-1).max(-1, keepdim=True)
        return selected, weights


@dataclass(frozen=True)
class Dense(Route):
    """All experts, weighted by their probabilities."""

    sums_to_one = True

    def __call__(self, logits: Float[Tensor, "T E"]) -> Routed:
        weights, selected = logits.softmax(-1).sort(-1, descending=True)
        return selected, weights


@dataclass(frozen=True)
class Hybrid(Route):
    """All experts where a token's router is undecided, else the most probable within top_p.

    Source: Li et al. 2025, DynMoLE, arXiv:2504.00661, and its code, github.com/mikecovlee/DynMoLE.
    """

    top_p: float  # the most probable are kept while they sum to at most this
    keep_top_k: int  # kept whatever they sum to
    entropy_index: float  # Tsallis' q
    entropy_threshold: float  # of its maximum, above which all are kept; 1: never
    entropy_eps: float = 0.0  # added to each probability in the entropy

    def __call__(self, logits: Float[Tensor, "T E"]) -> Routed:
        probabilities = logits.softmax(-1)
        weights, selected = probabilities.sort(-1, descending=True)
        sums = weights.detach().cumsum(-1)
        is_kept = sums <= self.top_p
        if self.entropy_threshold < 1:  # with entropy_eps the entropy may be above 1
            entropy = tsallis_entropy(probabilities.detach(), self.entropy_index, self.entropy_eps)
            is_undecided = entropy > self.entropy_threshold
            is_kept |= is_undecided.unsqueeze(-1)
        is_kept[..., : self.keep_top_k] = True
        return selected, weights.masked_fill(~is_kept, 0)


def tsallis_entropy(
    probabilities: Float[Tensor, "T E"], index: float, eps: float = 0.0
) -> Float[Tensor, " T"]:
    """Compute `(1 - Σ p^q) / (q - 1)` of each token, divided by its value for uniform p."""
    # At q = 1 it is Shannon's entropy divided by ln E; with one expert it is 1. `eps` is added to
    # each p first, as in DynMoLE (arXiv:2504.00661). Source: Tsallis 1988, doi:10.1007/BF01016429.
    num_experts = probabilities.shape[-1]
    if num_experts == 1:
        return torch.ones_like(probabilities[:, 0])
    # neither p log p nor p^q for q < 1 has a finite slope at 0
    tiny = torch.finfo(probabilities.dtype).tiny
    probabilities = (probabilities + eps).clamp_min(tiny)
    if abs(index - 1) < 1e-4:  # of powers so close, float32 tells no difference
        summands = probabilities * probabilities.log()
        return -summands.sum(-1) / math.log(num_experts)
    most = 1 - num_experts ** (1 - index)
    powers = probabilities.pow(index)
    return (1 - powers.sum(-1)) / most


class _RouterLogits(torch.autograd.Function):
    """`x @ W.T` in the router's dtype, keeping x in its own."""

    @staticmethod
    def forward(ctx, hidden_states, router, jitter):
        ctx.save_for_backward(hidden_states, router, jitter)
        return _router_input(hidden_states, router, jitter) @ router.T

    @staticmethod
    def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
        hidden_states, router, jitter = ctx.saved_tensors
        grad_hidden = grad @ router
        if jitter is not None:
            grad_hidden = grad_hidden * jitter
        grad_router = grad.T @ _router_input(hidden_states, router, jitter)
        return grad_hidden.to(hidden_states.dtype), grad_router, None


def _router_input(hidden_states: Tensor, router: Tensor, jitter: Tensor | None) -> Tensor:
    wide = hidden_states.to(router.dtype)
    return wide if jitter is None else wide * jitter


def router_logits(
    hidden_states: Float[Tensor, "T D"],
    router: Float[Tensor, "E D"],
    jitter: Float[Tensor, "T D"] | None = None,
) -> Float[Tensor, "T E"]:
    """Compute `(hidden_states * jitter) @ router.T` in float32 (float64 for a float64 router)."""
    return _RouterLogits.apply(hidden_states, router, jitter)
