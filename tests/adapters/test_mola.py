"""MoLA against the formula of its paper, arXiv:2402.08562, eq. 2-4; see tests/parity too."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import one_hot

from loraloom.adapters import MolaConfig
from tests.adapters.plain import MASK, compare, sum_experts, top_k_softmax
from tests.tiny import changed

CONFIG = MolaConfig(
    rank=2,
    alpha=5,
    num_experts=(3, 4),
    top_k=2,
    router_loss_scope="per_layer",
    router_aux_loss_coef=5.0,
    router_z_loss_coef=0.5,
)
EQUAL = changed(CONFIG, num_experts=4, top_k=3, router_loss_scope="pooled")
FAMILIES = ("llama", "phi", "phi3", "gpt_neox")


class Paper:
    """A router and experts on each projection, an expert at a time."""

    def __init__(self, config: MolaConfig):
        self.config = config
        self.logits: list[Tensor] = []

    def update(self, x: Tensor, own: dict[str, Tensor], key: str) -> Tensor:
        config, logits = self.config, x @ own["router"].T
        self.logits.append(logits[MASK.bool()])
        return config.alpha / config.rank * sum_experts(x, own, top_k_softmax(logits, config.top_k))

    def added_loss(self) -> Tensor:
        groups = self.logits
        if self.config.router_loss_scope == "pooled":
            groups = [torch.cat(self.logits)]
        balance = torch.stack([self._balance(logits) for logits in groups]).mean()
        squares = torch.stack([logits.logsumexp(-1).square().mean() for logits in self.logits])
        config = self.config
        return config.router_aux_loss_coef * balance + config.router_z_loss_coef * squares.mean()

    def _balance(self, logits: Tensor) -> Tensor:
        num_experts = logits.shape[-1]
        chosen = one_hot(logits.topk(self.config.top_k).indices, num_experts).double()
        return num_experts * (chosen.sum(1).mean(0) * logits.softmax(-1).mean(0)).sum()


@pytest.mark.parametrize("config", [CONFIG, EQUAL], ids=["by-layer", "pooled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_a_loop_over_the_experts(family, config):
    paper = Paper(config)
    compare(config, paper.update, family, paper.added_loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, r"top_k must be in \[1, num_experts=2\], got 3"),
        ({"num_experts": (4, 1)}, r"top_k must be in \[1, num_experts=1\], got 2"),
        ({"num_experts": ()}, r"num_experts.*\(\)|top_k must be in"),
        ({"num_experts": (4, 0)}, "greater than or equal to 1"),
        ({"num_experts": (4, 8), "router_loss_scope": "pooled"}, "router_loss_scope must be per_l"),
    ],
)
def test_settings_that_fit_no_model_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MolaConfig(**settings)
