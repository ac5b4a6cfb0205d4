"""MoSLoRA against the formula of its paper, arXiv:2406.11909."""

import math

import pytest
import torch
from torch import Tensor

from loraloom.adapters import MosLoraConfig
from tests.adapters.plain import compare
from tests.tiny import changed, tiny_host

CONFIG = MosLoraConfig(rank=3, alpha=5)
each_init = pytest.mark.parametrize("mixer_init", ["kaiming", "orthogonal"])


def paper_update(scaling: float):
    def update(x: Tensor, own: dict[str, Tensor], key: str) -> Tensor:
        """Add up, row of B by row of M, what the subspaces of A say."""
        low_rank = x @ own["lora_A"].T
        mixed = 0
        for row, mixer_row in enumerate(own["mixer"]):
            for subspace, weight in enumerate(mixer_row):
                mixed = mixed + weight * low_rank[..., subspace, None] * own["lora_B"][:, row]
        return scaling * mixed

    return update


@each_init
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
def test_logits_and_gradients_are_those_of_a_loop_over_the_subspaces(family, mixer_init):
    compare(changed(CONFIG, mixer_init=mixer_init), paper_update(5 / 3), family)


def mixers(mixer_init: str, seed: int = 0, rank: int = 6) -> list[Tensor]:
    host = tiny_host(configs={})
    adapter = host.add("a", changed(CONFIG, mixer_init=mixer_init, rank=rank), seed=seed)
    return [t for name, t in adapter.tensors().items() if name.endswith(".mixer")]


def test_a_mixer_starts_kaiming_uniform():
    values = torch.stack(mixers("kaiming"))
    bound = 1 / math.sqrt(6)
    assert 0.95 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_mixer_starts_orthogonal():
    for mixer in mixers("orthogonal"):
        product = mixer @ mixer.T
        torch.testing.assert_close(product, torch.eye(6).to(product), rtol=0, atol=1e-5)
