"""Rounds and decoding steps on the meta device, which stands in for an accelerator.

Its tensors have no data: to join them with the CPU's fails, and so does reading one.
What a round may read, once, is answered here; so are transformers' own looks at a mask.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from loraloom.data.tokens import Example, PreferencePair
from loraloom.host.host import Host
from loraloom.training.settings import CpoConfig, DpoConfig, SftConfig
from loraloom.training.step.batch import MicroBatch, Window
from loraloom.training.step.fused import forward_backward
from loraloom.training.step.objectives import Reference, build_objective
from tests.tiny import ALL_METHODS, changed, padded_mask

PAD_ID = 0
LENGTHS = (9, 6, 4, 2)
CHANGES = {
    "mola": {"num_experts": 4},
    "dora": {"modules_to_save": ("lm_head", "norm")},
    "mixlora": {"trainable_token_indices": (3, 5), "modules_to_save": ("lm_head",)},
}
reads: list[int] = []


def example(length: int, place: int) -> Example:
    ids = tuple(range(3, 3 + length))
    return Example(ids, ids, place)


@pytest.fixture
def host(monkeypatch):
    """A layer of Llama-2-7B's shape in bfloat16, with an adapter of each method."""

    def answered(read):
        def answer(tensor):
            if not tensor.is_meta:
                return read(tensor)
            reads.append(tensor.numel())
            return read(torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"))

        return answer

    reads.clear()
    monkeypatch.setattr(torch.Tensor, "cpu", answered(torch.Tensor.cpu))
    monkeypatch.setattr(torch.Tensor, "tolist", answered(torch.Tensor.tolist))
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: False)
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda positions: (positions == 0).cumsum(-1)
    )
    config = LlamaConfig(num_hidden_layers=1, vocab_size=320)
    with torch.device("meta"):
        host = Host(LlamaForCausalLM(config).to(torch.bfloat16))
    for name, method in ALL_METHODS.items():
        host.add(name, changed(method, **CHANGES.get(name, {})))
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
            reference=Reference() if isinstance(objective, DpoConfig) else None,
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


def test_a_reference_is_read_once_too(host):
    forward_backward(host, micro_batches(host, objective=DpoConfig())[:2], PAD_ID)
    assert len(reads) == 2  # what the reference says, and the round's numbers


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)], ids=["unpadded", "padded"])
def test_decoding_steps_of_every_method_read_nothing(host, lengths):
    names = [*host.adapters, None, next(iter(host.adapters))]
    mask = padded_mask([lengths[place % 2] for place in range(len(names))], "left", 5)
    ids = torch.zeros(mask.shape, dtype=torch.long, device="meta")
    session = host.prefill(ids, mask, names)
    for _ in range(2):
        assert host.decode(session, session.logits.argmax(-1)).shape == (len(names), 320)
    session.keep([3, 1])
    session.join(host.prefill(ids[:2], mask[:2], names[:2]))
    assert host.decode(session, torch.zeros(4, dtype=torch.long, device="meta")).is_meta
    assert reads == []
