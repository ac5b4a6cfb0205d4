"""Initial weights: a function of the seed and the tensor's name."""

from __future__ import annotations

import math

import pytest
import torch

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.errors import AdapterError
from tests.tiny import METHODS, changed, tiny_host, tiny_ids


def fresh(config: LoraConfig, seed: int = 0, before: tuple = (), family: str = "llama", **changes):
    """Add an adapter to a new host, after others."""
    host = tiny_host(family, {}, **changes)
    for index, other in enumerate(before):
        host.add(f"other{index}", other, seed=index)
    return host.add("a", config, seed=seed).tensors()


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_neighbours_and_their_order_do_not_matter(method):
    config, others = METHODS[method], (METHODS["mixlora"], METHODS["dora"])
    alone = fresh(config)
    assert_equal(fresh(config, before=others), alone)
    assert_equal(fresh(config, before=others[::-1]), alone)


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generator_neither_matters_nor_moves(method):
    torch.manual_seed(1)
    first = fresh(METHODS[method])
    host = tiny_host(configs={})
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    adapter = host.add("a", METHODS[method])
    assert torch.equal(torch.rand(1), expected)
    assert_equal(adapter.tensors(), first)


def test_the_adapters_name_does_not_matter():
    host = tiny_host(configs={})
    one, two = (host.add(name, METHODS["mixlora"]).tensors() for name in ("one", "two"))
    assert_equal(one, two)


def test_a_seed_gives_its_own_weights():
    zero, one = fresh(METHODS["mixlora"]), fresh(METHODS["mixlora"], seed=1)
    drawn = [name for name in zero if name.endswith(("lora_A", "router"))]
    assert not any(torch.equal(zero[name], one[name]) for name in drawn)


def test_no_two_tensors_start_alike():
    tensors = fresh(METHODS["mixlora"])
    drawn = [t.flatten()[:8] for name, t in tensors.items() if name.endswith(("lora_A", "router"))]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


def test_a_projection_starts_alike_whatever_else_is_adapted():
    everything = fresh(LoraConfig(rank=3))
    for targets in ("attention", "ffn", ("v_proj", "up_proj")):
        part = fresh(LoraConfig(rank=3, target_modules=targets))
        assert_equal(part, {name: everything[name] for name in part})


def test_an_expert_starts_alike_whatever_the_number_of_experts():
    two = fresh(MixLoraConfig(rank=2, num_experts=2))
    four = fresh(MixLoraConfig(rank=2, num_experts=4))
    shared = [name for name in two if ".experts." in name]
    assert all(torch.equal(two[name], four[name]) for name in shared)


def test_weight_decomposition_does_not_move_the_other_weights():
    dora = fresh(LoraConfig(rank=3, weight_decomposition=True))
    lora = fresh(LoraConfig(rank=3))
    assert_equal({name: dora[name] for name in lora}, lora)


def test_the_dtype_of_the_base_does_not_matter():
    low = fresh(METHODS["mixlora"], dtype=torch.bfloat16)
    full = fresh(METHODS["mixlora"], dtype=torch.float32)
    assert_equal(low, full)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_starts_that_peft_computes_begin_as_the_base_model(method, init):
    host = tiny_host("llama", {})
    host.add("a", changed(METHODS[method], init=init, rank=4, rank_pattern={"q_proj": 2}))
    out = host(tiny_ids(2), adapters=["a"] * 2).logits
    torch.testing.assert_close(out, host(tiny_ids(2)).logits, rtol=1e-5, atol=1e-5)
    assert all(bool(t.any()) for name, t in host.adapter("a").tensors().items())


def test_an_orthogonal_start_depends_on_the_seed_and_the_name_alone():
    config = LoraConfig(rank=4, init="orthogonal")
    torch.manual_seed(1)
    first = fresh(config)
    torch.manual_seed(2)
    assert_equal(fresh(config), first)
    assert not torch.equal(
        fresh(config, seed=1)["layers.0.mlp.up_proj.lora_A"], first["layers.0.mlp.up_proj.lora_A"]
    )
    assert not torch.equal(
        first["layers.0.mlp.up_proj.lora_A"], first["layers.0.mlp.gate_proj.lora_A"]
    )


@pytest.mark.parametrize("settings", [{"rank": 3}, {"rank": 4, "rank_pattern": {"q_proj": 3}}])
def test_an_orthogonal_start_needs_even_ranks(settings):
    with pytest.raises(ValueError, match="rank must be even for init: orthogonal, got 3"):
        LoraConfig(init="orthogonal", **settings)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_lora_a_has_the_spread_of_its_initialisation(init):
    config = LoraConfig(rank=16, init=init)
    tensors = fresh(config, hidden_size=256, intermediate_size=512)
    lora_A = tensors["layers.0.self_attn.q_proj.lora_A"]
    expected = 1 / 16 if init == "gaussian" else 1 / math.sqrt(3 * 256)
    assert float(lora_A.std()) == pytest.approx(expected, rel=0.1)
    if init == "kaiming":
        assert float(lora_A.abs().max()) <= 1 / math.sqrt(256)


def test_routers_are_normal_with_the_configured_deviation():
    config = MixLoraConfig(rank=2, num_experts=8, router_init_std=0.5)
    routers = [
        tensor for name, tensor in fresh(config, hidden_size=256).items() if name.endswith("router")
    ]
    assert float(torch.stack(routers).std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_lora_b_starts_at_zero_and_magnitudes_at_the_row_norms(method):
    host = tiny_host(configs={})
    for name, tensor in host.add("a", METHODS[method]).tensors().items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        elif name.endswith("magnitude"):
            path = name.partition(".experts")[0].removesuffix(".magnitude")
            weight = host.model.get_parameter(f"model.{path}.weight")
            torch.testing.assert_close(tensor, weight.norm(dim=1))


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_no_logits(method):
    host = tiny_host(configs={})
    host.add("a", METHODS[method])
    with torch.no_grad():
        base = host(tiny_ids(2)).logits
        adapted = host(tiny_ids(2), adapters=["a", "a"]).logits
    torch.testing.assert_close(adapted, base, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_has_no_more_directions_than_its_projection(init):
    smallest = min(min(size) for size in tiny_host("llama", {}).base.shapes.values())
    with pytest.raises(AdapterError, match=f"has {smallest} directions on .*, got rank"):
        fresh(LoraConfig(rank=smallest + 1, init=init), dtype=torch.float32)


def test_layers_without_any_of_the_targets_are_refused():
    config = LoraConfig(target_modules="attention", layers=(0,))
    with pytest.raises(AdapterError, match="layers must have some of target_modules"):
        fresh(config, family="lfm2")
