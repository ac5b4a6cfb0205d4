"""Compiled decoder layers against plain ones: `python -m tests.models.compiled_layers`."""

from __future__ import annotations

import torch

import loraloom
from tests.tiny import METHODS, tiny_host, tiny_ids, tiny_model


def compare(first: str) -> None:
    """Compile before or after attaching, and compare outputs, routing and gradients."""
    model, ids, names = tiny_model(), tiny_ids(4), [*METHODS]
    plain = tiny_host()
    if first == "compile":
        compile_layers(model)
    host = loraloom.attach(model)
    for name, config in METHODS.items():
        host.add(name, config).load_tensors(plain.adapters[name].tensors())
    if first == "attach":
        compile_layers(model)
    outputs = [
        each(ids, adapters=names, sample_keys=range(4), training=True) for each in (plain, host)
    ]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    assert {name: len(records) for name, records in outputs[1].routing.items()} == {
        "mixlora": 2,
        "mixdora": 2,
    }
    for output in outputs:
        output.logits.square().sum().backward()
    for name in names:
        for ours, theirs in zip(
            host.adapters[name].parameters(), plain.adapters[name].parameters(), strict=True
        ):
            torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain.model(ids).logits)


def compile_layers(model) -> None:
    """Compile in place, without code generation."""
    for layer in model.model.layers:
        layer.compile(backend="eager")


if __name__ == "__main__":
    for first in ("attach", "compile"):
        compare(first)
