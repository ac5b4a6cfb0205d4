"""Gradient checkpointing: less memory, the same numbers."""

import weakref

import pytest
import torch
from torch import Tensor

import loraloom
from loraloom.errors import ModelError
from loraloom.host.host import Host
from loraloom.training.memory import LiveStorages
from tests.tiny import (
    METHODS,
    ON_EXPERTS,
    changed,
    padded_mask,
    parameter_grads,
    randomise,
    tiny_host,
    tiny_ids,
    tiny_model,
)

NAMES = [*METHODS]
BLOCKS = {
    **{f"dense {name}": ("llama", METHODS[name]) for name in ("lora", "mixlora", "mixdora")},
    **{f"experts {name}": ("qwen3_moe", ON_EXPERTS[name]) for name in ("lora", "dora", "mixlora")},
}


def noisy_host(**changes) -> Host:
    return tiny_host(configs={n: changed(c, dropout=0.3) for n, c in METHODS.items()}, **changes)


def states_of(host: Host) -> Tensor:
    return host.hidden(tiny_ids(4), adapters=NAMES, sample_keys=range(4)).last_hidden_state


def test_another_forward_in_between_does_not_disturb_the_recomputation():
    results = []
    for disturbed in (False, True):
        host = noisy_host()
        host.train().enable_gradient_checkpointing()
        states = states_of(host)
        if disturbed:
            host.hidden(tiny_ids(2, 5), adapters=["mixlora", None], sample_keys=[8, 9])
        states.square().sum().backward()
        results.append({n: parameter_grads(a) for n, a in host.adapters.items()})
    for name, grads in results[0].items():
        assert all(torch.equal(results[1][name][key], grad) for key, grad in grads.items())


@pytest.mark.parametrize("family", ["phi", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_models_own_dropout_is_off_while_adapters_train(family, checkpointing):
    rates = {
        "phi": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
        "llama": {"attention_dropout": 0.5},
    }
    host = loraloom.attach(tiny_model(family, **rates[family]).train())
    for name, config in METHODS.items():
        randomise(host.add(name, config))
    with torch.no_grad():
        expected = host.hidden(tiny_ids(4), adapters=NAMES).last_hidden_state
    host.train().enable_gradient_checkpointing(checkpointing)
    states = states_of(host)
    torch.testing.assert_close(states.detach(), expected, rtol=0, atol=1e-12)
    weights = [*host.adapters["mixlora"].parameters()]
    first = torch.autograd.grad(states.sum(), weights)
    second = torch.autograd.grad(states_of(host).sum(), weights)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_checkpointed_layer_keeps_no_inputs_of_projections():
    host, inputs = noisy_host(), []
    for layer in host.model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: inputs.append(weakref.ref(args[0]))
        )
    host.train().enable_gradient_checkpointing()
    states = states_of(host)
    assert [ref() for ref in inputs] == [None] * len(inputs)
    states.sum().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_no_dropout_mask_lives_until_the_backward_pass(name, checkpointing):
    family, config = BLOCKS[name]
    configs = {"plain": changed(config, dropout=0.0), "noisy": changed(config, dropout=0.3)}
    host, ids = tiny_host(family, configs), tiny_ids(4)
    host.train().enable_gradient_checkpointing(checkpointing)
    live_bytes = []
    for adapter in configs:
        with LiveStorages(host.device) as storages:
            states = host.hidden(ids, adapters=[adapter] * 4, sample_keys=range(4))
            live_bytes.append(storages.live_bytes)
        states.last_hidden_state.sum().backward()
    mask_bytes = ids.numel() * 16 * 8  # the narrowest: an expert has 16 features, in float64
    assert live_bytes[1] - live_bytes[0] < mask_bytes


def test_a_recomputed_layer_fills_no_cache():
    host, ids = tiny_host(), tiny_ids(4)
    mask = padded_mask([7, 5, 6, 3])
    host.enable_gradient_checkpointing()
    out = host(ids, mask, NAMES, training=True)
    assert out.past_key_values is None
    out.logits.sum().backward()
    for run in (host, host.hidden):
        with pytest.raises(ModelError, match="does not support a cache; remove use_cache and"):
            run(ids, mask, NAMES, training=True, use_cache=True)
    with pytest.raises(ModelError, match="packed rows"):  # whose samples would see each other
        host.hidden(ids, None, NAMES, sample_lengths=[[2, 1]] * 4, use_cache=True)
    assert host(ids, mask, NAMES).past_key_values is not None
