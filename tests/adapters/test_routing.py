"""`routing` of mixtures: settings, files, like adapters at once, capacity and MoE-PEFT's own ways.

The formulas are held by tests/parity/test_dense_loop.py and tests/routing/test_routes.py.
"""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from loraloom.adapters import MixLoraConfig, MolaConfig
from tests.tiny import changed, padded_mask, tiny_host, tiny_ids

ROUTINGS: dict[str, dict[str, Any]] = {
    "top_p": {"routing": "top_p", "top_p": 0.6, "temperature": 1.5},
    "switch": {"routing": "switch", "expert_capacity": 3},
    "dense": {"routing": "dense"},
}
MIXTURES: dict[str, Any] = {
    f"{method.__name__[:4]} {routing}": method(rank=2, alpha=4, num_experts=4, **settings)
    for method in (MixLoraConfig, MolaConfig)
    for routing, settings in ROUTINGS.items()
}
each_mixture = pytest.mark.parametrize("mixture", MIXTURES)


@each_mixture
def test_like_mixtures_decode_at_once_as_alone(mixture):
    """phi's output projection has a bias."""
    host, ids = tiny_host("phi", dict.fromkeys("ab", MIXTURES[mixture])), tiny_ids(4, 3)
    names = ["b", None, "a", "b"]
    with torch.no_grad():
        expected = host(ids, adapters=names).logits
        alone = [host(ids[row, None], adapters=[name]).logits for row, name in enumerate(names)]
        with host.prepared():
            stacked = host(ids, adapters=names).logits
    torch.testing.assert_close(stacked, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat(alone), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "top_p", "top_k": 3}, "top_k requires routing: top_k, got top_p"),
        ({"top_p": 0.5}, "top_p requires routing: top_p, got top_k"),
        ({"routing": "dense", "temperature": 2}, "temperature requires routing: top_p"),
        ({"expert_capacity": 4}, "expert_capacity requires routing: switch"),
        ({"routing": "top_p", "top_p": 0}, "greater than 0"),
        ({"compat": "moe-peft"}, "compat must be unset where MoE-PEFT computes what"),
        ({"routing": "best"}, "'top_k', 'top_p', 'switch' or 'dense'"),
    ],
)
def test_settings_of_another_routing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MixLoraConfig(**settings)


@pytest.mark.parametrize("method", ["MixL", "Mola"])
def test_an_expert_that_is_full_lets_tokens_go_in_training_alone(method):
    full = MIXTURES[f"{method} switch"]
    hosts = {
        name: tiny_host("phi", {"a": changed(full, expert_capacity=capacity)})
        for name, capacity in {"any": None, "much": 7, "one": 1}.items()
    }
    ids, mask, states = tiny_ids(2), padded_mask([7, 5]), {}
    for training in (False, True):
        for name, host in hosts.items():
            out = host.hidden(ids, mask, ["a"] * 2, [1, 2], training=training)
            states[name, training] = out.last_hidden_state[mask.bool()].detach()
    for name in ("much", "one"):
        assert torch.equal(states[name, False], states["any", False])
    assert torch.equal(states["much", True], states["any", True])
    assert not torch.allclose(states["one", True], states["any", True])
    assert torch.equal(states["one", True][[0, 7]], states["any", True][[0, 7]])  # first tokens


def test_moe_pefts_switch_returns_a_blocks_input_outside_of_training():
    config = changed(MIXTURES["MixL switch"], compat="moe-peft", target_modules="ffn")
    host, ids = tiny_host(configs={"a": config}), tiny_ids(2)
    with torch.no_grad():
        actual = host(ids, adapters=["a", "a"]).logits
        model = host.detach()
        for layer in model.model.layers:
            layer.mlp.forward = lambda x: x
        expected = model(ids).logits
    torch.testing.assert_close(actual, expected)
