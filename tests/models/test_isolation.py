"""A diverged adapter leaves its neighbours' rows as they are: bit-equal outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from loraloom.adapters import MixLoraConfig
from loraloom.models.host import Host
from tests.tiny import METHODS, padded_mask, parameter_grads, tiny_host, tiny_ids

GROUPED = [None, "lora", "lora", "dora", "mixlora", "mixdora", "mixdora"]
MIXED = ["mixdora", "lora", None, "mixlora", "lora", "dora", "mixdora"]
LENGTHS = [7, 4, 6, 7, 5, 3, 7]


def diverge(host: Host, name: str, value: float) -> None:
    with torch.no_grad():
        for parameter in host.adapters[name].parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("names", [GROUPED, MIXED], ids=["grouped", "mixed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("diverged", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_logits_of_other_rows_are_bit_equal(family, diverged, value, names):
    host, ids, mask = tiny_host(family), tiny_ids(7), padded_mask(LENGTHS)
    others = [row for row, name in enumerate(names) if name != diverged]
    with torch.no_grad():
        before = host(ids, mask, names).logits
        diverge(host, diverged, value)
        after = host(ids, mask, names).logits
    assert not after[[row for row in range(7) if row not in others]].isfinite().all()
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("routing", ["top_p", "switch", "dense"])
def test_a_diverged_router_of_any_kind_leaves_other_rows_as_they_are(routing):
    config = MixLoraConfig(rank=2, num_experts=4, routing=routing)
    host = tiny_host(configs={"mix": config, "lora": METHODS["lora"]})
    ids, names = tiny_ids(2), ["mix", "lora"]
    with torch.no_grad():
        before = host(ids, padded_mask([7, 5]), names).logits
        diverge(host, "mix", torch.nan)
        after = host(ids, padded_mask([7, 5]), names).logits
        alone = host(ids[:1], None, ["mix"]).logits
    assert after[0].isnan().any()
    assert alone.isnan().all()
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("names", [GROUPED, MIXED], ids=["grouped", "mixed"])
@pytest.mark.parametrize("diverged", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gradients_of_other_adapters_are_bit_equal(family, diverged, names, checkpointing):
    host, ids, mask = tiny_host(family), tiny_ids(7), padded_mask(LENGTHS)
    host.train().enable_gradient_checkpointing(checkpointing)
    results = []
    for value in (None, torch.nan):
        if value is not None:
            diverge(host, diverged, value)
        states = host.hidden(ids, mask, names, sample_keys=range(7)).last_hidden_state
        real = mask.bool()
        host.token_losses(states[real], ids[real]).sum().backward()
        results.append({name: parameter_grads(a) for name, a in host.adapters.items()})
    assert all(grad.isnan().any() for grad in results[1].pop(diverged).values())
    for name, grads in results[1].items():
        assert all(torch.equal(grad, results[0][name][key]) for key, grad in grads.items()), name
