import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraloom import LoraConfig, RoutedConfig
from loraloom.adapters.weighted_sum import MAX_MEMBERS, parse_sum
from loraloom.host.choice import round_shares
from tests.tiny import tiny_host


@st.composite
def shares(draw):
    """Draw up to 200 shares in any order, many of them near one another."""
    base, spread = draw(st.floats(0, 1)), draw(st.sampled_from([0, 1e-6, 1e-3, 1]))
    offsets = draw(st.lists(st.floats(0, 1), min_size=1, max_size=200))
    weights = [base + spread * offset + 1e-9 for offset in offsets]
    return [weight / sum(weights) for weight in weights]


@given(shares())
def test_rounded_shares_sum_to_one_in_their_order_each_within_a_hundredth(shares):
    rounded = round_shares(shares)
    hundredths = [round(100 * share) for share in rounded]
    assert sum(hundredths) == 100
    assert rounded == [number / 100 for number in hundredths]
    ranked = sorted(zip(shares, hundredths, strict=True))
    assert [number for _, number in ranked] == sorted(hundredths)
    assert all(abs(a - b) < 0.01 + 1e-9 for a, b in zip(shares, rounded, strict=True))
    assert hundredths[shares.index(max(shares))] == max(hundredths) > 0


@pytest.mark.parametrize("num_experts", [6, 15, MAX_MEMBERS])
def test_the_most_probable_of_many_experts_weighs_most(num_experts):
    host = tiny_host("llama", {"law": LoraConfig(rank=1)}, torch.float32)
    names = [f"e{number}" for number in range(num_experts)]
    experts = dict.fromkeys(names, "law")
    host.add("auto", RoutedConfig(experts=experts, top_k=num_experts))
    chooser = host.adapters["auto"].prompt_router
    chooser.router.data.fill_(1e-6)
    chooser.offsets.data.copy_(torch.linspace(0, 1e-3, num_experts))
    (choice,) = host.choose([[5, 6, 7]], ["auto"])
    weights = {name.removeprefix("auto/"): w for name, w in parse_sum(choice.adapter)}
    assert weights.keys() == experts.keys()
    assert weights[names[-1]] == max(weights.values())
    assert sum(weights.values()) == pytest.approx(1)
    assert all(abs(choice.probabilities[name] - w) < 0.01 for name, w in weights.items())
