"""CoMoL: one A and one B, and between them small cores, mixed for each token.

    y = Wx + s·B Σ_e g_e M_e A x,    g = softmax(R A x)

Source: Cao et al. 2026, CoMoL: Efficient Mixture of LoRA Experts via Dynamic Core Space Merging,
arXiv:2603.00573, by its abstract: what that leaves open (the cores' start, a balance loss) is ours.

    python recipes/mixture/run.py recipes/methods/recent.yaml \
        --import goat,comol --output runs/methods/recent

Axes: T tokens, I in_features, O out_features, E cores, R rank.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

import loraloom
from loraloom.adapters.contract import Projection
from loraloom.adapters.experts import ExpertCount, MixtureConfig, Router
from loraloom.adapters.low_rank import generator_for, initial_A
from loraloom.routing.routes import router_logits


@loraloom.register_method
class ComolConfig(MixtureConfig):
    """A LoRA on each linear layer with cores between A and B, mixed by a router in rank space."""

    peft_type = "COMOL"
    title = "CoMoL"
    formula = "y = Wx + s·B Σ_e g_e M_e Ax, g = softmax(R Ax)"

    method: Literal["comol"] = "comol"
    """A shared A and B, and a mixture of cores between them."""
    num_experts: ExpertCount = 8
    """Cores of each projection."""
    core_noise: float = Field(default=0.1, ge=0)
    """Cores start as the identity plus normal noise with std core_noise / sqrt(rank)."""

    def projection(self, base, block, dtype, seed):
        return ComolProjection(base, self, dtype, seed)


class ComolProjection(Projection):
    """A, [R, I], the cores, [E, R, R], B, [O, R], and the router of Ax; B starts at zero."""

    def __init__(self, base, config, dtype, seed):
        super().__init__(base)
        rank, options = config.rank, {"dtype": dtype, "device": base.device}
        self.scaling = config.scaling
        lora_A = initial_A((rank, base.in_features), config.init, seed, f"{self.key}.lora_A")
        # With like cores a LoRA is what begins, and the noise lets routers tell them apart.
        cores = torch.eye(rank, dtype=torch.float32).repeat(config.num_experts, 1, 1)
        for expert, core in enumerate(cores):
            generator = generator_for(seed, f"{self.key}.experts.{expert}.core")
            core += torch.empty_like(core).normal_(
                std=config.core_noise / rank**0.5, generator=generator
            )
        self.lora_A = nn.Parameter(lora_A.to(**options))
        self.cores = nn.Parameter(cores.to(**options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        self.router = Router(f"{self.key}.router", (config.num_experts, rank), seed, **options)

    @property
    def num_columns(self):
        return len(self.lora_A)

    def compute_A(self, dtype):
        return self.lora_A.to(dtype)

    def compute_B(self, dtype):
        return (self.scaling * self.lora_B).T.to(dtype)  # (R, O)

    def between(self, low_rank, hidden_states, tokens):
        logits = router_logits(low_rank, self.router.weight)
        weights = logits.softmax(-1)  # (T, E)
        if tokens.record is not None:
            best_first = weights.sort(-1, descending=True)
            tokens.record_routing(logits, best_first.indices, best_first.values, self.path)
        # Mixing the results of all cores is mixing the cores.
        every = low_rank @ self.cores.to(low_rank.dtype).flatten(0, 1).T  # (T, E·R)
        weights = weights.to(low_rank.dtype).unsqueeze(1)  # (T, 1, E)
        return (weights @ every.unflatten(1, self.cores.shape[:2])).squeeze(1)  # (T, R)

    def tensors(self):
        yield f"{self.key}.lora_A", self.lora_A.detach()
        yield f"{self.key}.lora_B", self.lora_B.detach()
        for expert, core in enumerate(self.cores.detach()):
            yield f"{self.key}.experts.{expert}.core", core
