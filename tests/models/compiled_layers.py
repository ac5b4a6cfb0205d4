"""Compiled decoder layers against plain ones: `python -m tests.models.compiled_layers`."""

from __future__ import annotations

import torch

import loraloom
from tests.tiny import METHODS, tiny_host, tiny_ids, tiny_model


def compare() -> None:
    """Compile without code generation, and compare outputs, routing and gradients."""
    model, ids, names = tiny_model(), tiny_ids(2), ["mixdora", "lora"]
    plain, host = tiny_host(), loraloom.attach(model)
    for name in names:
        host.add(name, METHODS[name]).load_tensors(plain.adapters[name].tensors())
    for layer in model.model.layers:
        layer.compile(backend="eager")
    expected, actual = (
        each(ids, adapters=names, sample_keys=range(2), training=True) for each in (plain, host)
    )
    torch.testing.assert_close(actual.logits, expected.logits)
    assert len(actual.routing["mixdora"]) == 2
    for output in (expected, actual):
        output.logits.square().sum().backward()
    for name in names:
        pairs = zip(
            host.adapters[name].parameters(), plain.adapters[name].parameters(), strict=True
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.grad, theirs.grad)


if __name__ == "__main__":
    compare()
