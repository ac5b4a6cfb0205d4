"""Initial weights: a function of the seed and the tensor's name."""

import pytest
import torch

from loraloom.adapters import LoraConfig
from tests.tiny import ALL_METHODS, METHODS, tiny_host


def fresh(config: LoraConfig):
    return tiny_host(configs={}).add("a", config).tensors()


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_global_generator_dtype_and_device_do_not_matter_and_stay(method, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    request.addfinalizer(lambda: torch.set_default_device(None))
    torch.manual_seed(1)
    first = fresh(ALL_METHODS[method])
    host = tiny_host(configs={})
    torch.manual_seed(2)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    assert_equal(host.add("a", ALL_METHODS[method]).tensors(), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_tensors_start_alike():
    tensors = fresh(METHODS["mixlora"])
    drawn = [t.flatten()[:8] for name, t in tensors.items() if name.endswith(("lora_A", "router"))]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


def test_a_projection_starts_alike_whatever_else_is_adapted():
    everything = fresh(LoraConfig(rank=3))
    for targets in ("attention", "ffn", ("v_proj", "up_proj")):
        part = fresh(LoraConfig(rank=3, target_modules=targets))
        assert_equal(part, {name: everything[name] for name in part})
