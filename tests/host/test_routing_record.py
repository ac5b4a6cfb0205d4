"""What a forward reports of its mixtures' routing."""

import pytest
import torch

from tests.tiny import LAYERS, METHODS, padded_mask, tiny_host, tiny_ids

NAMES = ["mixlora", None, "mixdora", "lora", "mixlora"]
LENGTHS = [7, 5, 3, 7, 2]
REAL = {"mixlora": 9, "mixdora": 3}


def forward(host, **changes):
    arguments = {"input_ids": tiny_ids(5), "attention_mask": padded_mask(LENGTHS)} | changes
    return host.hidden(**arguments, adapters=NAMES, sample_keys=range(5))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_record_has_real_tokens_only(side):
    routing = forward(tiny_host(), attention_mask=padded_mask(LENGTHS, side)).routing
    for name, layers in routing.items():
        config = METHODS[name]
        for record in layers:
            assert record.router_logits.shape == (REAL[name], config.num_experts)
            assert record.selected_experts.shape == (REAL[name], config.top_k)
            assert record.routing_weights.shape == (REAL[name], config.top_k)
            assert (record.selected_experts >= 0).all()


def test_recomputation_adds_nothing_to_the_record():
    host = tiny_host()
    host.train().enable_gradient_checkpointing()
    out = forward(host)
    before = {name: list(layers) for name, layers in out.routing.items()}
    loss = out.last_hidden_state.sum()
    loss = loss + sum(r.router_logits.sum() for layers in before.values() for r in layers)
    loss.backward()
    assert {name: len(layers) for name, layers in out.routing.items()} == dict.fromkeys(
        REAL, LAYERS
    )
    assert all(
        record is kept
        for name, layers in out.routing.items()
        for record, kept in zip(layers, before[name], strict=True)
    )


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_with_a_cache_the_record_has_the_new_tokens():
    host, ids, mask = tiny_host(), tiny_ids(2), padded_mask([7, 5], "left")
    names = ["mixlora", "mixlora"]
    with torch.no_grad():
        full = host(ids, mask, names).routing["mixlora"]
        first = host(ids[:, :5], mask[:, :5], names, use_cache=True)
        rest = host(ids[:, 5:], mask, names, past_key_values=first.past_key_values)
    for layer in range(LAYERS):
        assert len(first.routing["mixlora"][layer].router_logits) == 5 + 3
        expected = full[layer].router_logits[[5, 6, 10, 11]]
        torch.testing.assert_close(
            rest.routing["mixlora"][layer].router_logits, expected, rtol=0, atol=1e-10
        )
