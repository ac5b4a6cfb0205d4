"""Whatever stands in an adapter's files: it is loaded, or one clear error names file and field."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.errors import FormatError
from loraloom.formats import read_adapter
from tests.formats.tiny import MIXTURE, edit_config, write


@pytest.fixture
def mixture(base, tmp_path):
    write(tmp_path / "a", base, MIXTURE)
    return tmp_path / "a"


def fault_of(directory, base) -> str:
    with pytest.raises(FormatError) as caught:
        read_adapter(directory, base)
    assert str(directory) in str(caught.value)
    return str(caught.value)


def pickled(directory, change) -> None:
    """Put the weights, changed, into a pickle instead."""
    file = directory / "adapter_model.safetensors"
    torch.save(change(load_file(file)), directory / "adapter_model.bin")
    file.unlink()


def first(tensors, change):
    name = next(iter(tensors))
    return tensors | {name: change(tensors[name])}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", ["x"]),
        ("task_type", "\x1b[31m"),
        ("bias", [1]),
        ("r", -1),
        ("lora_alpha", {"x": [1]}),
        ("use_dora", "\x1b[31m"),
        ("num_experts", 10_000_000),
        ("top_k", 10**300),
        ("expert_lora", ["x"]),
        ("routing_strategy", -1),
        ("loraloom", "x"),
    ],
)
def test_a_field_of_another_kind_is_an_error_that_can_be_shown(mixture, base, field, value):
    edit_config(mixture, **{field: value})
    fault = fault_of(mixture, base)
    assert field in fault or "adapter_config.json is not valid" in fault
    assert len(fault) < 1000
    assert "\x1b" not in fault


def test_a_broken_record_in_the_weights_header_is_an_error(base, tmp_path):
    write(tmp_path, base)
    weights = tmp_path / "adapter_model.safetensors"
    for record in ('{"base": [1]}', "[" * 1000, "{"):
        save_file(load_file(weights), weights, metadata={"loraloom": record})
        assert "`loraloom`" in fault_of(tmp_path, base)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_tensors_that_are_not_floating_point_are_named(saved, base, dtype):
    weights = saved / "adapter_model.safetensors"
    save_file(first(load_file(weights), lambda tensor: tensor.to(dtype)), weights)
    assert re.search("must be floating point .*lora_A", fault_of(saved, base))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to(torch.complex64),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: torch.zeros(1).expand(10**6, 10**6),
    ],
)
def test_tensors_of_a_pickle_that_are_no_plain_numbers_are_named(mixture, base, change):
    pickled(mixture, lambda tensors: first(tensors, change))
    assert re.search("tensors must be .*lora_A", fault_of(mixture, base))
