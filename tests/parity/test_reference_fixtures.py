"""Checkpoints of MoE-PEFT 2.0.2, the reference implementation, give its own outputs.

They are not in the repository: LORALOOM_SHARED names the folder that has `fixtures`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loraloom
from loraloom.models.host import Host, HostOutput
from tests.tiny import changed, router_loss

MIXTURES = ("llama-mixlora", "qwen2-mixlora", "phi-mixlora")
CASES = (*MIXTURES, "llama-lora")
TOLERANCE = 1e-4
REFERENCE_COEFFICIENT = 0.001


@pytest.fixture
def fixtures(shared_dir: Path) -> Path:
    directory = shared_dir / "fixtures"
    if not directory.is_dir():
        pytest.skip(f"no checkpoints in {directory}; set LORALOOM_SHARED")
    return directory


def attach_base(directory: Path) -> Host:
    return loraloom.attach(AutoModelForCausalLM.from_pretrained(directory / "base"))


def run(host: Host, case: Path, batch: str) -> tuple[HostOutput, Tensor, dict[str, Tensor]]:
    """Run the fixture's rows; `batch` is a prefix of its tensors' names."""
    expected = load_file(case / "expected.safetensors")
    expected = {
        name.removeprefix(batch): tensor
        for name, tensor in expected.items()
        if name.startswith("padded.") == bool(batch)
    }
    ids = expected["input_ids"]
    mask = expected.get("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        return host(ids, mask, ["a"] * len(ids)), mask.bool(), expected


batches = pytest.mark.parametrize("batch", ["", "padded."], ids=["full", "padded"])


@batches
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference(case, batch, fixtures):
    host = attach_base(fixtures / case.partition("-")[0])
    host.load("a", fixtures / case / "adapter")
    out, real, expected = run(host, fixtures / case, batch)
    torch.testing.assert_close(out.logits[real], expected["logits"][real], rtol=0, atol=TOLERANCE)


@batches
@pytest.mark.parametrize("case", MIXTURES)
def test_routing_is_that_of_the_reference(case, batch, fixtures):
    host = attach_base(fixtures / case.partition("-")[0])
    adapter = host.load("a", fixtures / case / "adapter")
    out, real, expected = run(host, fixtures / case, batch)
    record = out.routing["a"]
    for ours, theirs in zip(record, expected["router_logits"], strict=True):
        torch.testing.assert_close(ours.router_logits, theirs[real], rtol=0, atol=TOLERANCE)
    config = changed(adapter.config, router_aux_loss_coef=REFERENCE_COEFFICIENT)
    loss = router_loss(record, config)
    torch.testing.assert_close(loss, expected["aux_loss"].squeeze(), rtol=1e-5, atol=1e-7)


@batches
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_the_base_model_is_that_of_the_reference(family, batch, fixtures):
    host = attach_base(fixtures / family)
    expected = load_file(fixtures / family / "base_expected.safetensors")
    ids = expected[f"{batch}input_ids"]
    mask = expected.get(f"{batch}attention_mask", torch.ones_like(ids)).bool()
    with torch.no_grad():
        logits = host(ids, mask).logits
    torch.testing.assert_close(
        logits[mask], expected[f"{batch}logits"][mask], rtol=0, atol=TOLERANCE
    )


def test_a_saved_adapter_gives_the_same_logits_as_the_reference(tmp_path, fixtures):
    case = "llama-mixlora"
    host = attach_base(fixtures / "llama")
    host.load("first", fixtures / case / "adapter")
    host.save("first", tmp_path / "saved")
    assert host.load("a", tmp_path / "saved").config == host.adapters["first"].config
    out, real, expected = run(host, fixtures / case, "")
    torch.testing.assert_close(out.logits[real], expected["logits"][real], rtol=0, atol=TOLERANCE)


def test_rows_of_different_adapters_in_one_batch_are_those_of_the_reference(fixtures):
    """The third adapter, a MoLA, can't be loaded yet: its rows run on the base model."""
    names = ["lora", "mixlora", None]
    host = attach_base(fixtures / "llama")
    for name in names[:2]:
        host.load(name, fixtures / "multi" / name)
    expected = load_file(fixtures / "multi" / "expected.safetensors")
    mask = expected["attention_mask"].bool()
    index = expected["adapter_index"]
    with torch.no_grad():
        out = host(expected["input_ids"], mask, [names[i] for i in index.tolist()])
    known = mask & (index < 2)[:, None]
    torch.testing.assert_close(out.logits[known], expected["logits"][known], rtol=0, atol=TOLERANCE)
    rows = mask[index == 1]
    for ours, theirs in zip(out.routing["mixlora"], expected["mixlora.router_logits"], strict=True):
        torch.testing.assert_close(ours.router_logits, theirs[rows], rtol=0, atol=TOLERANCE)
    config = changed(host.adapters["mixlora"].config, router_aux_loss_coef=REFERENCE_COEFFICIENT)
    loss = router_loss(out.routing["mixlora"], config)
    torch.testing.assert_close(loss, expected["mixlora.aux_loss"].squeeze(), rtol=1e-5, atol=1e-7)
