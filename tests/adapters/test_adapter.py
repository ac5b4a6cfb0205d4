"""What an adapter holds: targets, tensors by name, and compute forms that follow its weights."""

from __future__ import annotations

import pytest
import torch

import loraloom
from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.errors import AdapterError
from tests.tiny import (
    ALL_FAMILIES,
    LAYERS,
    METHODS,
    gradients,
    randomise,
    tiny_host,
    tiny_ids,
    tiny_model,
)

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FFN = {"gate_proj", "up_proj", "down_proj"}


def empty_host(family: str = "llama", **changes):
    return tiny_host(family, {}, **changes)


def adapted_projections(adapter) -> set[str]:
    names = adapter.tensors()
    return {name.split(".")[3] for name in names if not name.endswith("router")}


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
    adapter = empty_host().add("a", LoraConfig(target_modules=targets))
    assert adapted_projections(adapter) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tensors_have_the_names_and_shapes_that_formats_expect(family, method):
    host = empty_host(family)
    adapter = host.add("a", METHODS[method])
    actual = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    assert actual == METHODS[method].tensor_shapes(host.base)
    numbers = sum(tensor.numel() for tensor in adapter.tensors().values())
    assert numbers == sum(parameter.numel() for parameter in adapter.parameters())


def test_unknown_target_modules_are_named_with_those_that_exist():
    with pytest.raises(AdapterError, match=r"q_proj.*up_proj.*got c_fc, w1"):
        empty_host().add("a", LoraConfig(target_modules=("w1", "q_proj", "c_fc")))


def test_a_mixture_needs_experts():
    config = MixLoraConfig(target_modules=("q_proj", "v_proj"))
    with pytest.raises(AdapterError, match=r"one of gate_proj, up_proj, down_proj, got q_proj"):
        empty_host().add("a", config)


def test_a_refused_adapter_leaves_no_trace():
    host = empty_host()
    with pytest.raises(AdapterError):
        host.add("a", LoraConfig(target_modules=("w1",)))
    assert host.adapters == {}
    host.add("a", LoraConfig())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_tensors_round_trip_through_load_tensors(family, method):
    host = tiny_host(family, {"a": METHODS[method]})
    tensors = {name: tensor.clone() for name, tensor in host.adapters["a"].tensors().items()}
    host.add("b", METHODS[method], seed=9).load_tensors(tensors)
    with torch.no_grad():
        logits = [host(tiny_ids(2), adapters=[name] * 2).logits for name in ("a", "b")]
    assert torch.equal(*logits)


def test_tensors_are_views_of_the_parameters():
    adapter = empty_host().add("a", METHODS["mixdora"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(7)
    assert all((tensor == 7).all() for tensor in adapter.tensors().values())
    assert not any(tensor.requires_grad for tensor in adapter.tensors().values())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_float32_whatever_the_base(method, dtype):
    adapter = empty_host(dtype=dtype).add("a", METHODS[method])
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_base_computes_in_bfloat16_and_routes_in_float32(method):
    ids, results = tiny_ids(3), []
    for dtype in (torch.bfloat16, torch.float32):
        host = tiny_host("llama", {"a": METHODS[method]}, dtype=dtype)
        host.train()
        out = host.hidden(ids, adapters=["a"] * 3, sample_keys=[1, 2, 3])
        logits = host.logits(out.last_hidden_state)
        assert logits.dtype == dtype
        for record in out.routing.get("a", []):
            assert record.router_logits.dtype == record.routing_weights.dtype == torch.float32
        host.token_losses(out.last_hidden_state.flatten(0, 1), ids.flatten()).mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in host.adapters["a"].parameters())
        grads = gradients(host.adapters["a"])
        results.append((logits.double(), torch.cat([g.flatten() for g in grads.values()]).double()))
    for low, full in zip(*results, strict=True):
        assert torch.cosine_similarity(low.flatten(), full.flatten(), dim=0) > 0.98


def logits_of(host, ids=None) -> torch.Tensor:
    ids = tiny_ids(2) if ids is None else ids
    with torch.no_grad():
        return host(ids, adapters=["a"] * 2).logits


def change_by_step(adapter, optimizer: torch.optim.Optimizer) -> None:
    sum(parameter.square().sum() for parameter in adapter.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()


def change_by_loading(adapter) -> None:
    adapter.load_tensors({name: tensor * 2 for name, tensor in adapter.tensors().items()})


def change_in_place(adapter) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)


def change_by_fused_step(adapter) -> None:
    change_by_step(adapter, torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True))


def change_by_default_step(adapter) -> None:
    change_by_step(adapter, torch.optim.AdamW(adapter.parameters(), lr=0.1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change",
    [
        change_by_loading,
        change_in_place,
        change_by_default_step,
        change_by_fused_step,
    ],
)
def test_evaluation_sees_weights_that_training_has_changed(change, method):
    host = tiny_host("llama", {"a": METHODS[method]})
    before = logits_of(host)
    host.train()
    change(host.adapters["a"])
    host.eval()
    fresh = loraloom.attach(tiny_model("llama"))
    fresh.add("a", METHODS[method]).load_tensors(host.adapters["a"].tensors())
    assert torch.equal(logits_of(host), logits_of(fresh))
    assert not torch.equal(logits_of(host), before)


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


def test_the_experts_of_a_copied_configuration_inherit_its_changes():
    config = MixLoraConfig(dropout=0.1)
    assert config.expert_config.dropout == 0.1
    assert config.model_copy(update={"dropout": 0.5}).expert_config.dropout == 0.5


def test_an_evaluation_between_backward_and_step_does_not_hide_the_step():
    host = tiny_host("llama", {"a": METHODS["mixdora"]})
    adapter = host.adapters["a"]
    sum(parameter.square().sum() for parameter in adapter.parameters()).backward()
    before = logits_of(host)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    optimizer.step()
    optimizer.zero_grad()
    fresh = loraloom.attach(tiny_model("llama"))
    fresh.add("a", METHODS["mixdora"]).load_tensors(adapter.tensors())
    assert torch.equal(logits_of(host), logits_of(fresh))
    assert not torch.equal(logits_of(host), before)


def test_evaluation_with_and_without_gradients_is_the_same():
    for method, config in METHODS.items():
        host = tiny_host("llama", {"a": config})
        with_graph = host(tiny_ids(2), adapters=["a"] * 2).logits.detach()
        torch.testing.assert_close(logits_of(host), with_graph, rtol=0, atol=1e-10, msg=method)


def test_inference_mode_works_and_leaves_training_possible():
    host = tiny_host("llama")
    names = [*METHODS]
    with torch.inference_mode():
        logits = host(tiny_ids(4), adapters=names).logits
    with torch.no_grad():
        assert torch.equal(host(tiny_ids(4), adapters=names).logits, logits)
    host.train()
    host.hidden(
        tiny_ids(4), adapters=names, sample_keys=range(4)
    ).last_hidden_state.sum().backward()


def test_a_layer_has_its_own_weights():
    adapter = randomise(empty_host().add("a", METHODS["mixdora"]))
    tensors = adapter.tensors()
    for name, tensor in tensors.items():
        if name.startswith("layers.0."):
            other = tensors[name.replace("layers.0.", f"layers.{LAYERS - 1}.")]
            assert not torch.equal(tensor, other), name


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


def double_vector(adapter, *_):
    parameters = list(adapter.parameters())
    vector = torch.nn.utils.parameters_to_vector(parameters) * 2
    torch.nn.utils.vector_to_parameters(vector, parameters)


def load_doubled(adapter, *_):
    adapter.load_state_dict({name: value * 2 for name, value in adapter.state_dict().items()})


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("method", ["lora", "mixdora"])
@pytest.mark.parametrize(
    "change", [step_without_backward, double_data, double_vector, load_doubled]
)
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
    host = empty_host()
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
