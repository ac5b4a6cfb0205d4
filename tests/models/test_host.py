"""The host: adding, removing, detaching, and what it refuses."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch

import loraloom
from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.errors import AdapterError, ConfigError, ModelError
from tests.tiny import METHODS, changed, padded_mask, tiny_host, tiny_ids, tiny_model


def test_attach_freezes_the_model_and_puts_it_in_eval_mode():
    model = tiny_model().train()
    host = loraloom.attach(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not host.training


def test_a_host_knows_its_models_config_device_and_dtype():
    model = tiny_model(dtype=torch.bfloat16)
    host = loraloom.attach(model)
    assert host.config is model.config
    assert (host.device, host.dtype) == (torch.device("cpu"), torch.bfloat16)


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


def test_a_taken_name_is_refused_and_the_adapter_kept():
    host = tiny_host(configs={})
    first = host.add("a", METHODS["lora"])
    with pytest.raises(AdapterError, match="'a' is taken"):
        host.add("a", METHODS["mixlora"])
    assert host.adapters == {"a": first}


def test_a_name_is_free_again_after_remove():
    host = tiny_host(configs={"a": METHODS["lora"]})
    host.remove("a")
    host.add("a", METHODS["mixdora"])


@pytest.mark.parametrize(
    "use",
    [
        lambda host: host(tiny_ids(1), adapters=["nobody"]),
        lambda host: host.hidden(tiny_ids(1), adapters=["nobody"]),
        lambda host: host.generate(tiny_ids(1), adapters=["nobody"], max_new_tokens=1),
        lambda host: host.remove("nobody"),
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


@pytest.mark.parametrize("keys", [[1], [1, 2, 3]])
def test_sample_keys_are_one_a_row(keys):
    host = tiny_host()
    host.train()
    with pytest.raises(AdapterError, match="sample_keys"):
        host.hidden(tiny_ids(2), adapters=["lora"] * 2, sample_keys=keys)


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
def test_dropout_is_off_outside_training(method):
    config = changed(METHODS[method], dropout=0.5)
    host, plain = tiny_host(configs={"a": config}), tiny_host(configs={"a": METHODS[method]})
    with torch.no_grad():
        expected = plain(tiny_ids(2), adapters=["a", "a"]).logits
        assert torch.equal(host(tiny_ids(2), adapters=["a", "a"]).logits, expected)
        host.train()
        assert not torch.allclose(host(tiny_ids(2), adapters=["a", "a"]).logits, expected)
        host.eval()
        assert torch.equal(host(tiny_ids(2), adapters=["a", "a"]).logits, expected)


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


def test_removing_an_adapter_changes_no_other():
    host = tiny_host()
    with torch.no_grad():
        before = host(tiny_ids(2), adapters=["lora", None]).logits
        host.remove("mixlora")
        assert torch.equal(host(tiny_ids(2), adapters=["lora", None]).logits, before)


def test_detach_restores_gradients_modes_hooks_and_forwards():
    model = tiny_model().train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    host = loraloom.attach(model)
    host.add("a", METHODS["mixdora"])
    host.train().enable_gradient_checkpointing()
    host.hidden(tiny_ids(1), adapters=["a"], sample_keys=[1]).last_hidden_state.sum().backward()
    host.eval()
    assert host.detach() is model
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert host.adapters == {}


def test_detach_lets_adapters_go():
    host = tiny_host(configs=METHODS)
    with torch.no_grad():
        host(tiny_ids(1, 1), adapters=["mixlora"])
    adapter = weakref.ref(host.adapters["mixlora"])
    host.detach()
    gc.collect()
    assert adapter() is None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_detach_restores_the_models_own_checkpointing():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    layers = model.model.layers
    before = [(x.gradient_checkpointing, x._gradient_checkpointing_func) for x in layers]
    host = loraloom.attach(model)
    host.train().enable_gradient_checkpointing()
    host.detach()
    assert [(x.gradient_checkpointing, x._gradient_checkpointing_func) for x in layers] == before


def test_detach_keeps_a_forward_that_others_have_put_on_an_ffn_block():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.forward = forward = lambda x: type(mlp).forward(mlp, x)
    loraloom.attach(model).detach()
    assert mlp.__dict__["forward"] is forward


def test_an_adapter_on_a_detached_host_is_refused():
    host = tiny_host(configs={})
    host.detach()
    with pytest.raises((AdapterError, ModelError)):
        host.add("a", LoraConfig())


def test_a_failed_forward_leaves_the_host_usable():
    host = tiny_host()
    with torch.no_grad():
        expected = host(tiny_ids(2), adapters=["lora", "mixlora"]).logits
        with pytest.raises(IndexError):
            host(tiny_ids(2) + 1000, adapters=["lora", "mixlora"])
        base = host.model(tiny_ids(2)).logits
        assert torch.equal(host(tiny_ids(2)).logits, base)
        assert torch.equal(host(tiny_ids(2), adapters=["lora", "mixlora"]).logits, expected)


def test_the_base_model_called_directly_knows_no_adapters():
    host = tiny_host()
    plain = tiny_model()
    with torch.no_grad():
        host(tiny_ids(2), adapters=["lora", "mixlora"])
        assert torch.equal(host.model(tiny_ids(2)).logits, plain(tiny_ids(2)).logits)


def test_labels_give_the_base_models_loss():
    host, ids, mask = tiny_host(), tiny_ids(2), padded_mask([7, 5])
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = host(ids, mask, ["lora", "mixlora"], labels=labels)
        states = host.hidden(ids, mask, ["lora", "mixlora"]).last_hidden_state
        real = mask[:, 1:].bool()
        expected = host.token_losses(states[:, :-1][real], ids[:, 1:][real]).mean()
    torch.testing.assert_close(out.loss.to(expected.dtype), expected, rtol=1e-6, atol=1e-6)


def test_logits_to_keep_keeps_the_last_positions():
    host, names = tiny_host(), [*METHODS]
    with torch.no_grad():
        full = host(tiny_ids(4), adapters=names).logits
        last = host(tiny_ids(4), adapters=names, logits_to_keep=1).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last, full[:, -1:], rtol=0, atol=1e-12)


def test_a_wrong_configuration_never_reaches_the_host():
    with pytest.raises(ValueError, match=r"top_k must be in \[1, num_experts=2\], got 3"):
        MixLoraConfig(num_experts=2, top_k=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_loads_with_its_configuration(method, tmp_path):
    host = tiny_host(configs={"a": METHODS[method]})
    host.save("a", tmp_path / "a")
    loaded = host.load("b", tmp_path / "a")
    original = host.adapters["a"]
    for name, tensor in original.tensors().items():
        torch.testing.assert_close(loaded.tensors()[name], tensor, rtol=1e-6, atol=1e-7)
    ignored = {"target_modules"}
    assert loaded.config.model_dump(exclude=ignored) == original.config.model_dump(exclude=ignored)


def test_loading_under_a_taken_name_is_refused(tmp_path):
    host = tiny_host(configs={"a": METHODS["lora"]})
    host.save("a", tmp_path / "a")
    with pytest.raises(AdapterError, match="taken"):
        host.load("a", tmp_path / "a")


def test_one_text_for_all_rows_is_refused():
    host = tiny_host("llama", {"a": METHODS["lora"]})
    with pytest.raises(AdapterError, match="adapters must be a list, one name a row, got the text"):
        host(tiny_ids(1), adapters="a")


def test_a_view_lets_a_removed_adapter_go():
    host = tiny_host("llama", {"a": METHODS["lora"]})
    known, view = weakref.ref(host.adapters["a"]), host.as_model("a")
    view(input_ids=tiny_ids(1))
    host.remove("a")
    del view
    gc.collect()
    assert known() is None
    host.detach()


def test_after_an_interrupt_inside_a_view_the_base_model_is_itself_again(monkeypatch):
    host, ids = tiny_host("llama", {"a": METHODS["lora"]}), tiny_ids(1)
    expected = host(ids).logits
    view = host.as_model("a")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(host.model.lm_head, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            view(input_ids=ids)
    assert torch.equal(host.model(ids).logits, expected)


def test_other_programs_do_not_train_on_a_float16_base():
    host = loraloom.attach(tiny_model("llama", torch.float16))
    host.add("a", METHODS["lora"])
    with pytest.raises(ModelError, match="needs a base model in bfloat16 or float32, got float16"):
        host.as_model("a").train()(input_ids=tiny_ids(1))


_MISTAKES = {
    "loraloom.attach(loraloom.attach(model))": "attach takes a model, got a host",
    "loraloom.attach('smollm2-135m')": "attach takes a causal LM of transformers, got str",
    "loraloom.attach(tiny_model()).add('p', peft.LoraConfig())": (
        "must be one of loraloom's, got peft.tuners.lora.config.LoraConfig"
    ),
    "loraloom.attach(tiny_model()).add(['p'], loraloom.LoraConfig())": "must be a safe file name",
}


def test_what_is_mistaken_for_a_model_a_name_or_a_configuration_is_a_sentence():
    """In a process of its own: here, types are checked before loraloom sees the mistake."""
    script = (
        "import loraloom, peft, sys\n"
        "from tests.tiny import tiny_model\n"
        "model = tiny_model()\n"
        "for code in sys.argv[1:]:\n"
        "    try:\n"
        "        eval(code)\n"
        "    except loraloom.LoraloomError as error:\n"
        "        print(' '.join(str(error).split()))\n"
    )
    command = [sys.executable, "-c", script, *_MISTAKES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, message in zip(done.stdout.splitlines(), _MISTAKES.values(), strict=True):
        assert message in line
