"""What an adapter holds: targets, tensors by name, and compute forms that follow its weights."""

import pytest
import torch

import loraloom
from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError
from tests.tiny import METHODS, tiny_host, tiny_ids, tiny_model

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FFN = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ATTENTION | FFN),
        ("attention", ATTENTION),
        ("ffn", FFN),
        (("q_proj", "down_proj"), {"q_proj", "down_proj"}),
    ],
)
def test_target_modules_are_groups_or_names(targets, expected):
    adapter = tiny_host(configs={}).add("a", LoraConfig(target_modules=targets))
    names = [name for name in adapter.tensors() if not name.endswith("router")]
    assert {name.split(".")[3] for name in names} == expected


def test_unknown_target_modules_are_named_with_those_that_exist():
    with pytest.raises(AdapterError, match=r"q_proj.*up_proj.*got w1, c_fc"):
        tiny_host(configs={}).add("a", LoraConfig(target_modules=("w1", "q_proj", "c_fc")))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_are_refused_before_anything_changes(fault):
    adapter = tiny_host(configs={"a": METHODS["lora"]}).adapters["a"]
    before = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()}
    name = "layers.1.mlp.down_proj.lora_B"
    if fault == "missing":
        del wrong[name]
    elif fault == "unexpected":
        wrong["layers.9.mlp.down_proj.lora_B"] = wrong[name]
    else:
        wrong[name] = wrong[name][:-1]
    with pytest.raises(AdapterError, match=r"layers\..*lora_B"):
        adapter.load_tensors(wrong)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.tensors().items())


def test_a_zero_row_of_a_base_weight_has_finite_factors_and_gradients():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0] = 0
    host = loraloom.attach(model)
    host.add("a", METHODS["dora"])
    states = host.hidden(tiny_ids(2), adapters=["a", "a"]).last_hidden_state
    states.square().sum().backward()
    assert states.isfinite().all()
    assert all(p.grad.isfinite().all() for p in host.adapters["a"].parameters())


def step_without_backward(adapter, host, ids, names):
    """A fused step on gradients that no backward pass has put there."""
    parameters = list(adapter.parameters())
    loss = host(ids, adapters=names).logits.square().sum()
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    optimizer.step()
    optimizer.zero_grad()


def double_data(adapter, *_):
    for parameter in adapter.parameters():
        parameter.data = parameter.data * 2


def load_doubled(adapter, *_):
    adapter.load_state_dict({name: value * 2 for name, value in adapter.state_dict().items()})


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("method", ["lora", "mixdora"])
@pytest.mark.parametrize("change", [step_without_backward, double_data, load_doubled])
def test_every_way_to_change_weights_is_noticed(change, method, length):
    host, ids, names = tiny_host(configs={"a": METHODS[method]}), tiny_ids(2, length), ["a"] * 2
    with torch.no_grad():
        before = host(ids, adapters=names).logits
    change(host.adapters["a"], host, ids, names)
    with torch.no_grad():
        after = host(ids, adapters=names).logits
    fresh = tiny_host(configs={"a": METHODS[method]})
    fresh.adapters["a"].load_tensors(host.adapters["a"].tensors())
    with torch.no_grad():
        expected = fresh(ids, adapters=names).logits
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, expected)


def test_an_adapter_of_inference_mode_decodes_and_trains():
    host = tiny_host(configs={})
    with torch.inference_mode():
        adapter = host.add("a", METHODS["mixdora"])
        host(tiny_ids(1, 1), adapters=["a"])
    host.train()
    host(tiny_ids(1), adapters=["a"]).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("method", ["dora", "mixdora"])
@pytest.mark.parametrize("factor", [1.003, 0.9985])
def test_magnitudes_count_below_the_steps_of_bfloat16(method, factor, length):
    host, ids = tiny_host(configs={"a": METHODS[method]}, dtype=torch.bfloat16), tiny_ids(8, length)
    outputs = []
    for scale in (1.0, factor):
        with torch.no_grad():
            for name, parameter in host.adapters["a"].named_parameters():
                if "magnitude" in name:
                    parameter.mul_(scale)
        with torch.set_grad_enabled(length > 1):
            outputs.append(host(ids, adapters=["a"] * 8).logits.detach())
    assert not torch.equal(*outputs)
