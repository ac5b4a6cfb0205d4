"""A round on the meta device, which stands in for an accelerator.

Its tensors have no data: to join them with the CPU's fails, and so does reading one.
What a round may read, once, is answered here; so are transformers' own looks at a mask.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from loraloom.config.objective import CpoConfig, SftConfig
from loraloom.data.examples import Example, PreferencePair
from loraloom.models.host import Host
from loraloom.training.step.fused import forward_backward
from loraloom.training.step.micro_batch import MicroBatch
from loraloom.training.step.objectives import build_objective
from loraloom.training.step.window import Window
from tests.tiny import ALL_METHODS

PAD_ID = 0
LENGTHS = (9, 6, 4, 2)
reads: list[int] = []


def example(length: int, place: int) -> Example:
    ids = tuple(range(3, 3 + length))
    return Example(ids, ids, place)


@pytest.fixture
def host(monkeypatch):
    """A layer of Llama-2-7B's shape in bfloat16, with an adapter of each method."""
    answer = torch.Tensor.tolist

    def read(tensor):
        if not tensor.is_meta:
            return answer(tensor)
        reads.append(tensor.numel())
        return [0.0] * tensor.numel()

    reads.clear()
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: False)
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda positions: (positions == 0).cumsum(-1)
    )
    config = LlamaConfig(num_hidden_layers=1, vocab_size=320)
    with torch.device("meta"):
        host = Host(LlamaForCausalLM(config).to(torch.bfloat16))
    for name, method in ALL_METHODS.items():
        layers = {"num_experts": 4} if name == "mola" else {}
        host.add(name, method.model_copy(update=layers))
    return host


def micro_batches(host, *, packing=False, objective=None):
    samples = [example(length, place) for place, length in enumerate(LENGTHS)]
    examples = samples
    if objective is not None:
        examples = [PreferencePair(*samples[:2]), PreferencePair(*samples[2:])]
    window = Window(0, tuple(examples), len(examples))
    return [
        MicroBatch(
            adapter,
            window.micro_batch(0),
            [1, 2, 3, 4],
            window,
            build_objective(objective or SftConfig()),
            max_row_length=24 if packing else None,
        )
        for adapter in host.adapters.values()
    ]


@pytest.mark.parametrize(
    ("packing", "checkpointing", "objective"),
    [(False, False, None), (True, False, None), (False, True, None), (False, False, CpoConfig())],
    ids=["padded", "packed", "checkpointed", "pairs"],
)
def test_a_round_of_every_method_reads_the_device_once(host, packing, checkpointing, objective):
    host.enable_gradient_checkpointing(checkpointing)
    forward_backward(host, micro_batches(host, packing=packing, objective=objective), PAD_ID)
    assert len(reads) == 1
    for adapter in host.adapters.values():
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None, (adapter.name, name)
            assert parameter.grad.is_meta
