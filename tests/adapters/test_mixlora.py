"""The derivatives of a mixture's FFN block; the formula itself is in tests/parity."""

from loraloom.adapters import MixLoraConfig
from tests.adapters.plain import check_ffn_gradients

CONFIG = MixLoraConfig(rank=2, alpha=4, num_experts=4, top_k=2, experts={"rank": 3, "alpha": 3})


def test_derivatives_are_those_of_finite_differences():
    check_ffn_gradients(CONFIG)
