"""Models are found by their structure, and taken if they compute what adapters need."""

import pytest
import torch
from torch import nn

import loraloom
from loraloom.adapters import LoraConfig
from loraloom.base.families import FAMILIES
from loraloom.errors import ModelError
from loraloom.host.trial import _HeldRoute, try_adapters
from tests.tiny import METHODS, randomise, tiny_ids, tiny_model

IDS = tiny_ids(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_the_list_passes_the_trial(family):
    try_adapters(loraloom.attach(tiny_model(family, torch.float32)))


def unknown(family: str = "llama") -> nn.Module:
    """A model whose type nobody knows."""
    model = tiny_model(family, torch.float32)
    model.config.model_type = "unheard_of"
    return model


def test_a_model_of_an_unknown_type_is_taken_and_trains_every_weight():
    host = loraloom.attach(unknown("phi3"))
    assert host.base.model_type == "unheard_of"
    assert host.adapters == {}
    adapter = host.add("a", METHODS["mixlora"])
    states = host.hidden(IDS, adapters=["a", "a"], training=True).last_hidden_state
    host.token_losses(states.flatten(0, 1), IDS.flatten()).sum().backward()
    assert all(weight.grad is not None for weight in adapter.parameters())


def swap_gate_and_up(model: nn.Module) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))


def ask_twice(model: nn.Module) -> None:
    attention = model.model.layers[0].self_attn
    once = attention.forward
    attention.forward = lambda **inputs: (
        attention.q_proj(inputs["hidden_states"]) is None or once(**inputs)
    )


def double_logits(model: nn.Module) -> None:
    def double(module, args, output):
        output.logits = 2 * output.logits
        return output

    model.register_forward_hook(double)


def fail(model: nn.Module) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: module.no_such_thing)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_gate_and_up, "ffn with a LoRA must equal what the model computes within 1e-05"),
        (ask_twice, r"layers\.0\.self_attn\.q_proj computes 2 times in a forward, not 1"),
        (double_logits, "its head's logits, scaled as its config says must equal"),
        (fail, "a forward with adapters fails: AttributeError"),
    ],
)
def test_what_computes_something_else_is_refused_by_name_and_left_as_it_was(change, reason):
    model = unknown()
    change(model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=rf"one of llama, .*'unheard_of' \(Llama.*: .*{reason}"):
        loraloom.attach(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(weight.requires_grad for weight in model.parameters())


def drop(path: str):
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("model.layers.0"), "no list of its modules has its 2 decoder layers"),
        (drop("model.layers.1.mlp.up_proj"), "no module with the FFN block's projections"),
        (drop("model.layers.0.mlp.act_fn"), "its FFN block has no module that is its activation"),
    ],
)
def test_what_is_built_otherwise_is_refused_with_the_reason(change, reason):
    model = unknown()
    change(model)
    with pytest.raises(ModelError, match=reason):
        loraloom.attach(model)


@pytest.mark.parametrize("place", [torch.bfloat16, torch.device("meta")], ids=str)
def test_rounding_is_no_difference_and_a_model_without_numbers_has_none(place):
    assert loraloom.attach(unknown().to(place)).base.model_type == "unheard_of"


@torch.no_grad()
@pytest.mark.parametrize("how", ["load_state_dict", "assigned", "in place"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_norms_are_of_the_weights_as_they_are(family, how):
    model = tiny_model(family, torch.float32)
    targets = "attention" if family == "llama" else "experts"
    host = loraloom.attach(model)
    config = LoraConfig(rank=2, target_modules=targets, weight_decomposition=True)
    adapter = randomise(host.add("a", config))
    host(IDS, adapters=["a"] * 2)
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    if how == "in place":
        for name, parameter in model.named_parameters():
            parameter.copy_(doubled[name])
    else:
        model.load_state_dict(doubled, assign=how == "assigned")
    for projection in adapter.projections():
        base = projection.base
        torch.testing.assert_close(base.squared_norms, base.weight.square().sum(-1))
    fresh = loraloom.attach(tiny_model(family, torch.float32, seed=1))
    fresh.model.load_state_dict(doubled)
    fresh.add("a", config).load_tensors(adapter.tensors())
    assert torch.equal(host(IDS, adapters=["a"] * 2).logits, fresh(IDS, adapters=["a"] * 2).logits)


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        ("granitemoe", 2),
        ("granitemoehybrid", 1),
        ("phimoe", 11),
        ("minimax_m2", 1),
        ("gemma4_text", 9),
    ],
)
def test_near_ties_of_a_bases_router_in_16_bits_are_no_fault(family, seed):
    try_adapters(loraloom.attach(tiny_model(family, torch.bfloat16, seed=seed)))


def test_routes_of_a_first_forward_are_held_in_pieces_of_later_ones():
    route = _HeldRoute(num_rows=2)
    index = torch.arange(12).view(12, 1)
    assert route(nn.Identity(), (index, index, index.float()))[1] is index
    other = index.flip(0)
    for start, stop in ((0, 4), (4, 6), (0, 6)):
        length = stop - start
        rows = [other[:length], other[6 : 6 + length]]
        _, held, weights = route(nn.Identity(), (*[torch.cat(rows)] * 2, torch.cat(rows).float()))
        expected = torch.cat([index[start:stop], index[6 + start : 6 + stop]])
        assert torch.equal(held, expected)
        assert torch.equal(weights, expected.float())
