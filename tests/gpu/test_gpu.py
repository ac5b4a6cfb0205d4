"""Rounds and decoding on a GPU against the CPU's, and FFN blocks in float16 against float32."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import loraloom
from loraloom.host.host import Host
from loraloom.ops.lean_expert_ffn import lean_expert_ffn
from loraloom.training.settings import SftConfig
from loraloom.training.step.batch import MicroBatch, Window
from loraloom.training.step.objectives import build_objective
from tests import tiny
from tests.ops.ffn_case import SHAPES, FfnCase, make_case, run, with_gradients
from tests.training.toy import PAD_ID, forward_backward, toy_examples

DEVICE = "cuda"


def make_host(device: str) -> Host:
    """A tiny model with an adapter of each method, whose weights are the same everywhere."""
    source = tiny.tiny_host(configs=tiny.ALL_METHODS, dtype=torch.float32)
    host = loraloom.attach(tiny.tiny_model(dtype=torch.float32).to(device))
    for seed, (name, config) in enumerate(tiny.ALL_METHODS.items()):
        host.add(name, config, seed).load_tensors(source.adapters[name].tensors())
    return host


def train(host: Host, names: Sequence[str], row_length: int | None = None) -> list[Tensor]:
    """Do a round; losses, and each adapter's gradients."""
    window, objective = Window(0, tuple(toy_examples(4)), 4), build_objective(SftConfig())
    adapters = [host.adapters[name] for name in names]
    batches = [
        MicroBatch(
            adapter, window.examples, [1, 2, 3, 4], window, objective, max_row_length=row_length
        )
        for adapter in adapters
    ]
    losses = forward_backward(host, batches, PAD_ID)
    gradients = [
        [p.grad for p in adapter.parameters() if p.grad is not None] for adapter in adapters
    ]
    return [
        torch.tensor([loss.loss + loss.aux_loss for loss in losses]),
        *(torch.cat([gradient.flatten() for gradient in own]).cpu() for own in gradients),
    ]


def assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    errors = [tiny.relative_error(*pair) for pair in zip(ours, expected, strict=True)]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("row_length", [None, 24], ids=["padded", "packed"])
def test_a_round_of_every_method_is_the_cpus(row_length):
    ours, cpus = (train(make_host(d), list(tiny.ALL_METHODS), row_length) for d in (DEVICE, "cpu"))
    assert_close(ours, cpus, 1e-3)


def test_decoding_with_every_method_is_the_cpus():
    names, logits = [*tiny.ALL_METHODS, None], []
    mask = tiny.padded_mask([7 - place % 3 for place in range(len(names))], "left")
    for device in (DEVICE, "cpu"):
        host = make_host(device)
        session = host.prefill(tiny.tiny_ids(len(names)).to(device), mask, names)
        prefilled = session.logits.cpu()
        decoded = host.decode(session, tiny.tiny_ids(len(names), 1)[:, 0].to(device)).cpu()
        logits.append([prefilled, decoded])
    assert_close(*logits, 1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_ffn_block_is_the_plain_form(shape, decomposed, dropout):
    sizes = {"num_tokens": 70, "features": 130, "rank": 20, "padding": [64]}
    case = make_case(shape, decomposed=decomposed, dropout=dropout, **sizes)
    half = case.to(torch.float16, DEVICE)
    assert_close(block(half), block(half.to(torch.float32)), 0.1)


def block(case: FfnCase) -> list[Tensor]:
    return [one.cpu() for one in with_gradients(run(lean_expert_ffn, case).float(), case)]
