from __future__ import annotations

from loraloom.adapters import MixLoraConfig
from loraloom.routing.collapse import find_collapse

CONFIG = MixLoraConfig(num_experts=8, top_k=2)
EVEN = [1000] * 8
UNUSED = [1200, 1200, 1200, 1200, 1200, 1200, 800, 0]
COLLAPSED = [4000, 3900, 20, 20, 20, 20, 20, 20]


def found(*rows: list[int], config: MixLoraConfig = CONFIG) -> dict[str, str]:
    return find_collapse({(10 + n, None): row for n, row in enumerate(rows)}, config.top_k)


def test_routers_of_projections_are_named_and_may_have_different_experts():
    text = find_collapse({(3, "self_attn.q_proj"): COLLAPSED, (4, "mlp.up_proj"): [900] * 4}, 2)
    assert text["collapsed layers"].endswith(": layer 3 self_attn.q_proj (2.2)")


def test_a_balanced_load_is_nothing_to_speak_of():
    assert found(EVEN, EVEN) == {}
    assert found([500, 1900, 700, 900, 1400, 1000, 1500, 100]) == {}


def test_unused_experts_are_named_with_their_layers():
    text = found(EVEN, UNUSED)["unused experts"]
    assert text.startswith("1 of 16 experts are hardly used")
    assert text.endswith(": layer 11 (expert 7)")
    assert "below 0.12 % of choices, 12.5 % would be even" in text


def test_a_few_unused_experts_among_many_are_common():
    assert found(UNUSED, EVEN)
    assert found(UNUSED, EVEN, EVEN) == {}


def test_collapsed_layers_are_named_with_their_number():
    text = found(COLLAPSED, EVEN)["collapsed layers"]
    assert "effective number at most 2.6 of 8, top_k is 2" in text
    assert text.endswith(": layer 10 (2.2)")


def test_many_layers_are_counted():
    assert found(*[UNUSED] * 9)["unused experts"].endswith("layer 13 (expert 7), 5 more layers")


def test_few_choices_say_nothing():
    assert found([10, 0, 0, 0, 0, 0, 0, 0]) == {}


def test_a_mixture_whose_tokens_take_all_experts_cant_collapse():
    config = MixLoraConfig(num_experts=2, top_k=2)
    assert found([5000, 0], config=config) == {}
