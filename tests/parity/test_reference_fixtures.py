"""Checkpoints of MoE-PEFT 2.0.2, the reference implementation, give its own outputs.

They are not in the repository: LORALOOM_SHARED names the folder that has `fixtures`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loraloom
from loraloom.adapters import AdapterConfig
from loraloom.host.host import Host, HostOutput
from loraloom.routing.record import LayerRouting
from tests.tiny import changed

MIXTURES = ("llama-mixlora", "qwen2-mixlora", "phi-mixlora")
CASES = (*MIXTURES, "llama-lora", "llama-mola", "llama-loramoe", "llama-axolotl")
TOLERANCE = 1e-4


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


def assert_same_loss(record: list[LayerRouting], config: AdapterConfig, expected: Tensor) -> None:
    config = changed(config, router_aux_loss_coef=0.001, router_loss_scope="pooled")
    loss = config.auxiliary_loss(record)
    torch.testing.assert_close(loss, expected.squeeze(), rtol=1e-5, atol=1e-7)


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
    assert_same_loss(record, adapter.config, expected["aux_loss"])


def by_projection(record: list[LayerRouting], names: list[str]) -> list[list[LayerRouting]]:
    """Sort the record of routers of their own into layers, each in the order of the names."""
    routers = {(entry.layer, str(entry.projection).rpartition(".")[2]): entry for entry in record}
    assert len(routers) == len(record)
    layers = range(1 + max(layer for layer, _ in routers))
    return [[routers[layer, name] for name in names] for layer in layers]


def assert_same_routers(record: list[list[LayerRouting]], expected: Tensor, real: Tensor) -> None:
    """Compare with router logits by layer and projection, [layer, projection, B, L, E]."""
    assert (len(record), len(record[0])) == expected.shape[:2]
    for ours, theirs in zip(record, expected, strict=True):
        for entry, logits in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                entry.router_logits, logits[real], rtol=0, atol=TOLERANCE, msg=entry.projection
            )


@batches
@pytest.mark.parametrize("name", ["llama-mola", "llama-loramoe"])
def test_routers_of_each_projection_are_those_of_the_reference(name, batch, fixtures):
    case, host = fixtures / name, attach_base(fixtures / "llama")
    adapter = host.load("a", case / "adapter")
    out, real, expected = run(host, case, batch)
    names = json.loads((case / "meta.json").read_text())["router_projections"]
    assert_same_routers(by_projection(out.routing["a"], names), expected["router_logits"], real)
    if "aux_loss" in expected:
        assert_same_loss(out.routing["a"], adapter.config, expected["aux_loss"])


@pytest.mark.parametrize("case", ["llama-mixlora", "llama-mola", "llama-loramoe", "llama-axolotl"])
def test_a_saved_adapter_gives_the_same_logits_as_the_reference(tmp_path, fixtures, case):
    host = attach_base(fixtures / "llama")
    host.load("first", fixtures / case / "adapter")
    host.save("first", tmp_path / "saved")
    assert host.load("a", tmp_path / "saved").config == host.adapters["first"].config
    out, real, expected = run(host, fixtures / case, "")
    torch.testing.assert_close(out.logits[real], expected["logits"][real], rtol=0, atol=TOLERANCE)


def test_rows_of_different_adapters_in_one_batch_are_those_of_the_reference(fixtures):
    host, case = attach_base(fixtures / "llama"), fixtures / "multi"
    names = json.loads((case / "meta.json").read_text())["adapters"]
    for name in names:
        host.load(name, case / name)
    expected = load_file(case / "expected.safetensors")
    mask, index = expected["attention_mask"].bool(), expected["adapter_index"]
    with torch.no_grad():
        out = host(expected["input_ids"], mask, [names[i] for i in index.tolist()])
    torch.testing.assert_close(out.logits[mask], expected["logits"][mask], rtol=0, atol=TOLERANCE)
    assert out.routing.keys() == {"mixlora", "mola"}
    real = {name: mask[index == names.index(name)] for name in out.routing}
    for ours, theirs in zip(out.routing["mixlora"], expected["mixlora.router_logits"], strict=True):
        logits = theirs[real["mixlora"]]
        torch.testing.assert_close(ours.router_logits, logits, rtol=0, atol=TOLERANCE)
    record = by_projection(out.routing["mola"], ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert_same_routers(record, expected["mola.router_logits"], real["mola"])
    for name, routing in out.routing.items():
        assert_same_loss(routing, host.adapters[name].config, expected[f"{name}.aux_loss"])
