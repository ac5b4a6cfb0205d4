"""Small forwards without gradients: like adapters are computed together, and nobody notices."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from loraloom.models.host import Host
from tests.tiny import METHODS, tiny_host, tiny_ids

ROWS = [
    "lora",
    None,
    "mixlora-b",
    "lora-b",
    "mixlora",
    "mixlora-b",
    "dora",
    None,
    "mixdora",
    "lora",
]


def host_with_pairs(family: str) -> Host:
    """A host with two like adapters of some methods; the second ones have other weights."""
    host = tiny_host(family)
    for name in ("lora", "mixlora"):
        first = host.adapters[name]
        second = host.add(f"{name}-b", METHODS[name], seed=5)
        second.load_tensors({key: value.roll(1, 0) for key, value in first.tensors().items()})
    return host


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
@pytest.mark.parametrize("length", [1, 5])
def test_rows_get_what_the_way_with_gradients_gives_them(family, length):
    host, ids = host_with_pairs(family), tiny_ids(len(ROWS), length)
    with_gradients = host(ids, None, ROWS)
    with torch.no_grad():
        out = host(ids, None, ROWS)
    torch.testing.assert_close(out.logits, with_gradients.logits.detach(), rtol=1e-9, atol=1e-9)
    assert out.routing.keys() == with_gradients.routing.keys()
    for name, layers in out.routing.items():
        for ours, theirs in zip(layers, with_gradients.routing[name], strict=True):
            assert ours.layer == theirs.layer
            assert ours.selected_experts.equal(theirs.selected_experts)
            torch.testing.assert_close(ours.router_logits, theirs.router_logits.detach())
            torch.testing.assert_close(ours.routing_weights, theirs.routing_weights.detach())


@torch.no_grad()
@pytest.mark.parametrize("diverged", ["lora", "mixlora-b", "dora", "mixdora"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_diverged_adapter_leaves_its_companions_alone(family, diverged):
    host, ids = host_with_pairs(family), tiny_ids(len(ROWS), 2)
    before = host(ids, None, ROWS).logits
    for parameter in host.adapters[diverged].parameters():
        parameter.fill_(torch.nan)
    after = host(ids, None, ROWS).logits
    others = [row for row, name in enumerate(ROWS) if name != diverged]
    assert torch.equal(after[others], before[others])
    assert not after[ROWS.index(diverged)].isfinite().any()


@torch.no_grad()
def test_base_rows_are_those_of_the_base_model():
    host, ids = host_with_pairs("phi"), tiny_ids(len(ROWS), 1)
    base = [row for row, name in enumerate(ROWS) if name is None]
    alone = host(ids, None, None).logits[base]
    torch.testing.assert_close(host(ids, None, ROWS).logits[base], alone, rtol=1e-13, atol=1e-13)


def test_new_weights_are_noticed():
    host, ids = host_with_pairs("llama"), tiny_ids(3, 1)
    names = ["lora", "lora-b", "lora"]
    adapter = host.adapters["lora"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = host(ids, None, names).logits
    host(ids, None, names).logits.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    host.adapters["lora-b"].zero_grad()
    with torch.no_grad():
        after = host(ids, None, names).logits
        again = host(ids, torch.tensor([[1]] * 3), names).logits
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert torch.equal(again, after)
    torch.testing.assert_close(after, host(ids, None, names).logits.detach())


@torch.no_grad()
def test_a_removed_adapter_is_freed():
    host = host_with_pairs("llama")
    host(tiny_ids(2, 1), None, ["lora", "lora-b"])
    gone = weakref.ref(host.adapters["lora-b"])
    host.remove("lora-b")
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_large_forward_takes_the_other_way(monkeypatch):
    monkeypatch.setattr("loraloom.models.stacking.MAX_HIDDEN_BYTES", 0)
    host, ids = host_with_pairs("llama"), tiny_ids(len(ROWS), 1)
    other_way = host(ids, None, ROWS).logits
    monkeypatch.undo()
    torch.testing.assert_close(host(ids, None, ROWS).logits, other_way, rtol=1e-9, atol=1e-9)
