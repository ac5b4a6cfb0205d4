"""The host: adding, removing, detaching, and what it refuses."""

import gc
import inspect
import weakref

import pytest
import torch

import loraloom
from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError, ConfigError, DataError, ModelError
from tests.tiny import METHODS, changed, padded_mask, tiny_host, tiny_ids, tiny_model


def test_a_model_is_attached_once():
    model = tiny_model()
    host = loraloom.attach(model)
    with pytest.raises(ModelError, match=r"call detach\(\)"):
        loraloom.attach(model)
    host.detach()
    loraloom.attach(model)


def test_the_base_models_weights_are_never_touched():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    host = loraloom.attach(model)
    for name, config in METHODS.items():
        host.add(name, config)
    assert model.state_dict().keys() == before.keys()
    host.train()
    host.hidden(
        tiny_ids(4), adapters=[*METHODS], sample_keys=range(4)
    ).last_hidden_state.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 101])
def test_names_are_safe_file_names(name):
    with pytest.raises(ConfigError, match="safe file name"):
        tiny_host(configs={}).add(name, LoraConfig())


@pytest.mark.parametrize(
    "use",
    [
        lambda host: host(tiny_ids(1), adapters=["nobody"]),
        lambda host: host.hidden(tiny_ids(1), adapters=["nobody"]),
        lambda host: host.save("nobody", "nowhere"),
    ],
)
def test_an_unknown_adapter_is_named_with_those_that_are_there(use):
    with pytest.raises(AdapterError, match=r"lora, dora, mixlora, mixdora.*'nobody'"):
        use(tiny_host())


@pytest.mark.parametrize("names", [["lora"], ["lora"] * 3, []])
def test_adapters_are_one_a_row(names):
    host = tiny_host()
    with pytest.raises(AdapterError, match=f"each of the 2 rows, got {len(names)}"):
        host(tiny_ids(2), adapters=names)
    with pytest.raises(DataError, match="attention_mask must have 6 columns, got 3"):
        host(tiny_ids(2, 6), torch.ones(2, 3))
    with pytest.raises(AdapterError, match="each of the 2 rows, got 'ab'"):
        host.generate(tiny_ids(2), adapters="ab")


def test_sample_keys_decide_the_dropout():
    host = tiny_host(configs={"a": LoraConfig(rank=3, alpha=6, dropout=0.5)})
    host.train()
    ids = tiny_ids(2)
    run = lambda keys: host.hidden(ids, adapters=["a"] * 2, sample_keys=keys).last_hidden_state  # noqa: E731
    first, same, other, unnamed = run([1, 2]), run([1, 2]), run([1, 3]), run(None)
    assert torch.equal(first, same)
    assert torch.equal(first[0], other[0])
    assert not torch.allclose(first[1], other[1])
    assert not torch.allclose(first, unnamed)
    assert not torch.allclose(run(None), unnamed)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_off_outside_training_which_is_said_for_one_forward_or_all(method):
    config = changed(METHODS[method], dropout=0.5)
    host, plain = tiny_host(configs={"a": config}), tiny_host(configs={"a": METHODS[method]})
    with torch.no_grad():
        run = lambda host, **mode: host(tiny_ids(2), adapters=["a", "a"], **mode).logits  # noqa: E731
        expected = run(plain)
        assert not torch.allclose(run(host, training=True), expected)
        assert torch.equal(run(host), expected)
        host.train()
        assert not torch.allclose(run(host), expected)
        assert torch.equal(run(host, training=False), expected)
        assert torch.equal(run(host.eval()), expected)


def test_a_removed_adapter_is_freed():
    host = tiny_host()
    host.train()
    states = host.hidden(tiny_ids(4), adapters=[*METHODS], sample_keys=range(4)).last_hidden_state
    states.sum().backward()
    host.eval()
    with torch.no_grad():
        host(tiny_ids(4), adapters=[*METHODS])
    adapter = weakref.ref(host.adapters["mixdora"])
    del states
    host.remove("mixdora")
    gc.collect()
    assert adapter() is None


def test_attach_freezes_and_detach_restores_gradients_modes_hooks_and_forwards():
    model = tiny_model().train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    host = loraloom.attach(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in (host, *model.modules()))
    host.add("a", METHODS["mixdora"])
    host.train().enable_gradient_checkpointing()
    host.hidden(tiny_ids(1), adapters=["a"], sample_keys=[1]).last_hidden_state.sum().backward()
    host.eval()
    assert host.detach() is model
    with pytest.raises(AdapterError, match="is detached from its model"):
        host(tiny_ids(1))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert host.adapters == {}


def test_labels_give_the_base_models_loss():
    host, ids, mask = tiny_host(), tiny_ids(2), padded_mask([7, 5])
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = host(ids, mask, ["lora", "mixlora"], labels=labels)
        states = host.hidden(ids, mask, ["lora", "mixlora"]).last_hidden_state
        real = mask[:, 1:].bool()
        expected = host.token_losses(states[:, :-1][real], ids[:, 1:][real]).mean()
    torch.testing.assert_close(out.loss.to(expected.dtype), expected, rtol=1e-6, atol=1e-6)


def test_other_programs_do_not_train_on_a_float16_base():
    host = loraloom.attach(tiny_model("llama", torch.float16))
    host.add("a", METHODS["lora"])
    with pytest.raises(ModelError, match="needs a base model in bfloat16 or float32, got float16"):
        host.as_model("a").train()(input_ids=tiny_ids(1))


def test_a_replaced_ffn_block_is_told():
    host = tiny_host()
    host.model.model.layers[1].mlp.forward = torch.zeros_like  # as Liger kernels do
    for forward in (host, host.as_model("mixlora")):
        with pytest.raises(ModelError, match="train with use_liger_kernel=False"):
            forward(input_ids=tiny_ids(1))


def test_a_host_shows_what_is_on_it():
    host = tiny_host(configs={}, dtype=torch.float32)
    assert repr(host) == "Host(llama, torch.float32, adapters: none)"
    host.add("law", LoraConfig(rank=3, target_modules=("q_proj",)))
    host.add("mix", METHODS["mixlora"])
    host.adapters["mix"].requires_grad_(False)
    law = "law (LoRA of rank 3, 384 trainable)"
    mix = "mix (MixLoRA of rank 2, 0 trainable)"
    assert repr(host) == f"Host(llama, torch.float32, adapters: {law}, {mix})"
    host.merge("law")
    assert repr(host).endswith("0 trainable), merged: law)")


def test_what_is_mistaken_for_a_model_is_told():
    attach = inspect.unwrap(loraloom.attach)  # without the tests' own checks of types
    with pytest.raises(ModelError, match="requires a causal LM of transformers, got Host"):
        attach(attach(tiny_model()))
    with pytest.raises(ModelError, match="requires a causal LM of transformers, got str"):
        attach("smollm2-135m")
