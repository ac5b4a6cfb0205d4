"""A float32 base model under autocast: the base in bfloat16, routers and gradients in float32."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import METHODS, parameter_grads, tiny_host, tiny_ids

NAMES = [*METHODS, None]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_outputs_are_near_those_in_float32(family, with_gradients):
    host, ids = tiny_host(family, dtype=torch.float32), tiny_ids(len(NAMES))
    exact = host(ids, None, NAMES)
    with autocast(), torch.set_grad_enabled(with_gradients):
        out = host(ids, None, NAMES)
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits.float() - exact.logits).norm() < 0.03 * exact.logits.norm()
    for name in ("mixlora", "mixdora"):
        ours, theirs = out.routing[name][0], exact.routing[name][0]
        assert ours.router_logits.dtype == ours.routing_weights.dtype == torch.float32
        error = (ours.router_logits - theirs.router_logits).norm()
        assert error < 0.03 * theirs.router_logits.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_near_those_in_float32(checkpointing):
    ids, results = tiny_ids(len(NAMES)), []
    for context in (torch.enable_grad(), autocast()):
        host = tiny_host("llama", dtype=torch.float32)
        host.train().enable_gradient_checkpointing(checkpointing)
        with context:
            states = host.hidden(ids, adapters=NAMES).last_hidden_state[:, :-1]
            losses = host.token_losses(states.flatten(0, 1), ids[:, 1:].flatten())
        assert losses.dtype == torch.float32
        losses.mean().backward()
        results.append({name: parameter_grads(host.adapters[name]) for name in METHODS})
    for name in METHODS:
        exact, ours = (torch.cat([g.flatten() for g in r[name].values()]) for r in results)
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.1 * exact.norm(), name


def test_rows_of_a_small_forward_get_what_a_large_one_gives_them(monkeypatch):
    host, ids = tiny_host("llama", dtype=torch.float32), tiny_ids(len(NAMES), 1)
    with autocast(), torch.no_grad():
        small = host(ids, None, NAMES).logits.float()
        monkeypatch.setattr("loraloom.models.stacks.MAX_HIDDEN_BYTES", 0)
        large = host(ids, None, NAMES).logits.float()
    assert (small - large).norm() < 0.03 * large.norm()
