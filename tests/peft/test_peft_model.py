"""loraloom's methods under PEFT's API: what a PeftModel does is what a host does."""

import pickle
import threading

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model

import loraloom
from loraloom import AdapterError, ConfigError, MixLoraConfig, RoutedConfig
from loraloom.adapters.lora import LoraProjection
from loraloom.peft import LoraloomConfig
from tests.tiny import (
    ALL_METHODS,
    changed,
    parameter_grads,
    randomise,
    relative_error,
    tiny_ids,
    tiny_model,
)

MIX = ALL_METHODS["mixlora"]
IDS = tiny_ids(3)
BY_PEFT_ITSELF = ("lora", "dora", "vera")
"""Methods whose files PEFT reads as its own."""


def peft_model(config=MIX, name: str = "default", seed: int = 0, model=None):
    """A PEFT model with a randomised adapter, in eval mode."""
    base = tiny_model(dtype=torch.float32) if model is None else model
    wrapped = get_peft_model(base, LoraloomConfig(adapter=config, seed=seed), name)
    randomise(wrapped.base_model.host.adapter(name), seed)
    return wrapped.eval()


def host_of(config=MIX, name: str = "default", seed: int = 0):
    host = loraloom.attach(tiny_model(dtype=torch.float32))
    randomise(host.add(name, config, seed=seed), seed)
    return host


@torch.no_grad()
def logits(model, **kwargs):
    return model(IDS, **kwargs).logits


@pytest.mark.parametrize(
    ("method", "safe"), [(method, place % 2 == 0) for place, method in enumerate(ALL_METHODS)]
)
def test_what_a_peft_model_saves_a_host_loads(method, safe, tmp_path):
    wrapped = peft_model(ALL_METHODS[method])
    wrapped.save_pretrained(tmp_path, safe_serialization=safe)
    host = loraloom.attach(tiny_model(dtype=torch.float32))
    assert changed(host.load("a", tmp_path).config) == host.adapter("a").config
    assert torch.equal(logits(host, adapters=["a"] * 3), logits(wrapped))


@pytest.mark.parametrize("method", [name for name in ALL_METHODS if name not in BY_PEFT_ITSELF])
def test_what_a_host_saves_a_peft_model_loads(method, tmp_path):
    host = host_of(ALL_METHODS[method])
    host.save("default", tmp_path)
    wrapped = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path)
    assert isinstance(wrapped.peft_config["default"], LoraloomConfig)
    assert torch.equal(logits(wrapped), logits(host, adapters=["default"] * 3))
    assert not wrapped.training
    assert wrapped.get_nb_trainable_parameters()[0] == 0


@torch.no_grad()
def test_a_router_by_prompt_goes_to_peft_and_back(tmp_path):
    host = host_of(ALL_METHODS["lora"], "law")
    randomise(host.add("math", ALL_METHODS["dora"]), 1)
    host.add("auto", RoutedConfig(experts={"law": "law", "math": "math"}))
    host.adapter("auto").prompt_router.router.normal_()
    host.save("auto", tmp_path / "ours")
    wrapped = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path / "ours", "auto")
    wrapped.save_pretrained(tmp_path / "theirs")
    host.load("theirs", tmp_path / "theirs" / "auto")
    assert torch.equal(logits(wrapped), logits(host, adapters=["theirs"] * 3))
    ids, greedy = tiny_ids(3), {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    ours = host.generate(ids, adapters=["theirs"] * 3, **greedy)
    assert torch.equal(wrapped.generate(input_ids=ids, **greedy), ours)


@pytest.mark.parametrize("method", BY_PEFT_ITSELF)
def test_files_of_pefts_own_methods_load_as_either(method, tmp_path, monkeypatch):
    peft_model(ALL_METHODS[method]).save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path)
    assert not isinstance(theirs.peft_config["default"], LoraloomConfig)
    monkeypatch.setattr("loraloom.formats.raw_files.snapshot_download", lambda *_, **__: tmp_path)
    config = LoraloomConfig.from_pretrained("owner/name")
    ours = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path, config=config)
    assert relative_error(logits(ours), logits(theirs)) < 1e-6


def test_low_cpu_mem_usage_loads_the_same(tmp_path):
    host = host_of()
    host.save("default", tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("CAUSAL_LM", "QUESTION_ANS"))  # as MoE-PEFT's are
    base = tiny_model(dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(wrapped), logits(host, adapters=["default"] * 3))


def test_a_saved_model_is_found_with_its_base_model(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = type(tiny_model()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    wrapped = peft_model(model=base)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), LoraloomConfig)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(again), logits(wrapped))


def test_adapters_of_several_methods_take_turns_or_share_a_batch():
    wrapped = peft_model()
    wrapped.add_adapter("second", LoraloomConfig(adapter=ALL_METHODS["dora"], seed=1))
    randomise(wrapped.base_model.host.adapter("second"), 1)
    first = logits(wrapped)
    wrapped.set_adapter("second")
    second = logits(wrapped)
    dora = host_of(ALL_METHODS["dora"], seed=1)
    assert relative_error(second, logits(dora, adapters=["default"] * 3)) < 1e-6
    mixed = logits(wrapped, adapter_names=["default", "second", "__base__"])
    for row, expected in enumerate((first, second, logits(tiny_model(dtype=torch.float32)))):
        assert relative_error(mixed[row], expected[row]) < 1e-5
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert all(".second." in name for name in trained)


def test_what_a_method_freezes_stays_frozen(monkeypatch):
    build = LoraProjection.__init__

    def frozen(self, *arguments):
        build(self, *arguments)
        self.lora_A.requires_grad_(False)

    monkeypatch.setattr(LoraProjection, "__init__", frozen)
    wrapped = peft_model(ALL_METHODS["lora"])
    for _ in range(2):
        trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
        assert trained
        assert not any("lora_A" in name for name in trained)
        wrapped.set_adapter("default")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training_the_loss_has_the_auxiliary_loss(checkpointing):
    wrapped, host = peft_model(), host_of()
    if checkpointing:
        wrapped.activation_checkpointing_enable()
    out = wrapped.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    expected = host(IDS, adapters=["default"] * 3, training=True, labels=IDS)
    aux = host.adapter("default").config.auxiliary_loss(expected.routing["default"])
    (expected.loss + aux).backward()
    assert aux > 0
    assert torch.equal(out.aux_loss, aux)
    assert pickle.loads(pickle.dumps(wrapped.config)).router_aux_loss_coef == 1.0
    theirs = parameter_grads(host.adapter("default"))
    ours = parameter_grads(wrapped.base_model.host.adapter("default"))
    assert all(relative_error(ours[name], theirs[name]) < 1e-6 for name in theirs)


def test_a_micro_batchs_auxiliary_loss_has_its_share_of_the_steps_labels():
    wrapped = peft_model().train()
    labels = IDS.clone()
    labels[:, :4] = -100  # leaves 3 labels in each of 3 rows
    out = wrapped(input_ids=IDS, labels=labels, num_items_in_batch=36)
    alone = wrapped(input_ids=IDS, labels=labels)
    base = wrapped.base_model.host(IDS, adapters=["default"] * 3, labels=labels).loss
    torch.testing.assert_close(out.loss, base * 9 / 36 + alone.aux_loss * 9 / 36)
    torch.testing.assert_close(alone.loss, base + alone.aux_loss)
    view = host_of().as_model("default").train()
    by_position = view(IDS, None, None, None, labels, num_items_in_batch=36)
    torch.testing.assert_close(by_position.loss, out.loss)


def test_an_interrupted_forward_leaves_the_model_to_other_threads():
    wrapped = peft_model()
    expected = logits(wrapped)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = wrapped.get_base_model().lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(wrapped)
    hook.remove()
    results = []
    thread = threading.Thread(target=lambda: results.append(logits(wrapped)), daemon=True)
    thread.start()
    thread.join(30)
    assert results
    assert torch.equal(results[0], expected)


def test_a_mixture_is_not_merged_and_unload_gives_the_base_model_back():
    base = tiny_model(dtype=torch.float32)
    expected, attributes = logits(base), set(vars(base))
    wrapped = peft_model(model=base)
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
        with pytest.raises(AdapterError, match="can't be merged here; save them"):
            merge()
    assert wrapped.unload() is base
    assert torch.equal(logits(base), expected)
    assert set(vars(base)) == attributes
    assert all(weight.requires_grad for weight in base.parameters())


def test_what_can_not_be_used_is_refused_and_leaves_the_base_model_alone(tmp_path):
    with pytest.raises(ConfigError, match="configuration must be one of loraloom's"):
        LoraloomConfig(adapter=peft.LoraConfig())
    with pytest.raises(ValueError, match=r"top_k must be in \[1, num_experts=4\]"):
        LoraloomConfig(adapter={"method": "mixlora", "num_experts": 4, "top_k": 9})
    with pytest.raises(ConfigError, match="task_type must be CAUSAL_LM, got 'SEQ_CLS'"):
        LoraloomConfig(adapter=MIX, task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="call get_peft_model with this"):
        LoraloomConfig(adapter=MIX).save_pretrained(tmp_path)
    base = tiny_model(dtype=torch.float32)
    expected = logits(base)
    with pytest.raises(AdapterError, match="target_modules must name projections"):
        peft_model(MixLoraConfig(target_modules=("nope",)), model=base)
    with pytest.raises(KeyError, match="contain"):  # as for PEFT's own
        peft_model(name="v1.5", model=base)
    assert torch.equal(logits(base), expected)
    wrapped = peft_model(model=base)
    with pytest.raises(AdapterError, match="for each of the 4 rows, got 2"):
        wrapped(tiny_ids(4), adapter_names=["default", "__base__"])
    with pytest.raises(AdapterError, match=r"must have one per row \(4\), got"):
        wrapped.generate(input_ids=tiny_ids(4), adapter_names=["default", "__base__"])
    with pytest.raises(AdapterError, match="one adapter can be active at a time"):
        wrapped.base_model.set_adapter(["default", "other"])
