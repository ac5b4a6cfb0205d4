"""A router by prompt: from the base model's states to the experts of a whole prompt.

Axes: T tokens of all prompts, B prompts, D hidden, E experts.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loraloom.adapters.tensor_names import Weights
from loraloom.errors import AdapterError

# Of the fit: AdamW's.
STEPS = 200
RATE = 0.03
DECAY = 0.01
# Near 0 the most telling token of a prompt decides; the larger, the more all tokens count alike.
# One word must be enough where it names the source, and style where none does.
BREADTH = 10.0
# Tokens whose states are in the router's dtype at once.
CHUNK = 2**15


class PromptRouter(Weights):
    """Logits of a prompt's experts: 10 log mean exp(w·h + b) over its tokens."""

    # h are the last states of some decoder layers, of none the embeddings; w has the shape [E, D].

    def __init__(self, shape: tuple[int, int], num_layers_read: int, temperature: float):
        super().__init__()
        self.router = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.offsets = nn.Parameter(torch.zeros(shape[0]), requires_grad=False)
        self.num_layers_read = num_layers_read
        self.temperature = temperature

    def forward(self, states: Tensor, owners: Tensor) -> Tensor:
        """Compute [B, E] of all tokens' states, [T, D], and the numbers of their prompts, [T]."""
        if len(self.router) > 1 and not self.router.any(1).all():
            raise AdapterError("a router by prompt must be fitted first to all; call fit_router")
        return self.logits(states, owners) / self.temperature

    def logits(self, states: Tensor, owners: Tensor) -> Tensor:
        return _logits(self.scores(states), owners)

    def scores(self, states: Tensor) -> Tensor:
        """Compute w·h + b, [T, E]."""
        weight = self.router.T
        products = [chunk.to(weight.dtype) @ weight for chunk in states.split(CHUNK)]
        return torch.cat(products) + self.offsets

    @torch.enable_grad()
    def fit(self, states: Tensor, owners: Tensor, targets: Tensor, rows: Sequence[int]) -> None:
        """Fit the rows of some experts to prompts whose experts' numbers are targets, [B]."""
        chunks = states.split(CHUNK)
        mean, std = _mean_and_std(chunks)
        device = states.device
        indices = torch.tensor(rows, device=device)
        # Of standardized states: w = weight / (std · 10), b = offset / 10 - w · mean.
        weight = torch.zeros(len(rows), len(mean), device=device, requires_grad=True)
        offset = torch.zeros(len(rows), device=device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, offset], RATE, weight_decay=DECAY)
        with torch.no_grad():
            fixed = self.logits(states, owners).float()
        for step in range(STEPS):
            cosine = math.cos(math.pi * step / STEPS)
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + cosine)
            scaled = weight / (std * BREADTH)
            scores = torch.cat([chunk.float() @ scaled.T for chunk in chunks])
            scores = scores + offset / BREADTH - scaled @ mean
            logits = fixed.index_copy(1, indices, _logits(scores, owners))
            optimizer.zero_grad()
            cross_entropy(logits, targets).backward()
            optimizer.step()
        with torch.no_grad():
            scaled = weight / (std * BREADTH)
            self.router[indices] = scaled.to(self.router.dtype)
            offsets = offset / BREADTH - scaled @ mean
            self.offsets[indices] = offsets.to(self.offsets.dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for expert, row in enumerate(self.router.detach()):
            yield f"shared.router_{expert}", row
            yield f"shared.router_offset_{expert}", self.offsets.detach()[expert]


def _logits(scores: Tensor, owners: Tensor) -> Tensor:
    counts = owners.bincount()
    empty = scores.new_zeros(len(counts), scores.shape[1])
    fixed = scores.detach()
    index = owners.unsqueeze(1).expand_as(fixed)
    most = empty.scatter_reduce(0, index, fixed, "amax", include_self=False)
    shifted = scores - most[owners]
    sums = empty.index_add(0, owners, shifted.exp())
    log_sums = sums.log() + most
    return BREADTH * (log_sums - counts.unsqueeze(1).log())


def _mean_and_std(chunks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    num_tokens = sum(len(chunk) for chunk in chunks)
    sums = [chunk.float().sum(0) for chunk in chunks]
    mean = torch.stack(sums).sum(0) / num_tokens
    squares = [(chunk.float() - mean).square().sum(0) for chunk in chunks]
    variance = torch.stack(squares).sum(0) / num_tokens
    return mean, variance.sqrt() + 1e-5
