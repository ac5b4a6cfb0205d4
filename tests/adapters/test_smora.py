"""SMoRA against a loop over its ranks, arXiv:2501.15103."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import one_hot

from loraloom.adapters import SmoraConfig
from tests.adapters.plain import MASK, compare, top_k_softmax

CONFIG = SmoraConfig(rank=6, alpha=9, top_k=2, router_aux_loss_coef=3.0)


class Paper:
    """Each rank a LoRA of rank 1."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def update(self, x: Tensor, own: dict[str, Tensor], key: str) -> Tensor:
        logits = x @ own["router"].T
        self.logits.append(logits[MASK.bool()])
        weights, update = top_k_softmax(logits, 2), 0
        for rank in range(6):
            of_rank = torch.outer(own["lora_B"][:, rank], own["lora_A"][rank])
            update = update + weights[..., rank, None] * (x @ of_rank.T)
        return 1.5 * update

    def added_loss(self) -> Tensor:
        logits = torch.cat(self.logits)
        chosen = one_hot(logits.topk(2).indices, 6).double().sum(1)
        return 3.0 * 6 * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_logits_and_gradients_are_those_of_a_loop_over_the_ranks(family):
    paper = Paper()
    compare(CONFIG, paper.update, family, paper.added_loss)


def test_more_ranks_for_a_token_than_there_are_is_an_error():
    with pytest.raises(ValidationError, match=r"top_k must be in \[1, rank=4\], got 5"):
        SmoraConfig(rank=4, top_k=5)
