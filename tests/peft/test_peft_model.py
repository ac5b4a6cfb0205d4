"""loraloom's methods under PEFT's API: what a PeftModel does is what a host does."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import DynamicCache

import loraloom
from loraloom import AdapterError, ConfigError, FormatError, MixLoraConfig, ModelError
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

# peft 0.21 asks transformers 5.24 in a way that the latter calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

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


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_gives_a_hosts_logits(method):
    config = ALL_METHODS[method]
    expected = logits(host_of(config), adapters=["default"] * 3)
    assert torch.equal(logits(peft_model(config)), expected)


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


@pytest.mark.parametrize("method", BY_PEFT_ITSELF)
def test_files_of_pefts_own_methods_load_as_either(method, tmp_path):
    peft_model(ALL_METHODS[method]).save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path)
    assert not isinstance(theirs.peft_config["default"], LoraloomConfig)
    config = LoraloomConfig.from_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path, config=config)
    assert relative_error(logits(ours), logits(theirs)) < 1e-6


def test_low_cpu_mem_usage_loads_the_same(tmp_path):
    host = host_of()
    host.save("default", tmp_path)
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


def test_only_the_adapter_is_trained(capsys):
    wrapped = peft_model()
    count = sum(p.numel() for p in wrapped.base_model.host.adapter("default").parameters())
    assert wrapped.get_nb_trainable_parameters()[0] == count
    wrapped.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert all(".default." in name for name in trained)


def test_without_a_seed_initial_weights_follow_torchs_own():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        base = tiny_model(dtype=torch.float32)
        models.append(get_peft_model(base, LoraloomConfig(adapter=MIX)).base_model.host)
    first, same, other = (model.adapter("default").router(0) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_disabled_it_is_the_base_model():
    wrapped, expected = peft_model(), logits(tiny_model(dtype=torch.float32))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), expected)
        assert wrapped.get_model_status().enabled is False
    assert not torch.equal(logits(wrapped), expected)
    assert wrapped.get_model_status().enabled is True


def test_adapters_of_several_methods_take_turns_or_share_a_batch():
    wrapped = peft_model()
    wrapped.add_adapter("second", LoraloomConfig(adapter=ALL_METHODS["dora"], seed=1))
    randomise(wrapped.base_model.host.adapter("second"), 1)
    first = logits(wrapped)
    wrapped.set_adapter("second")
    second = logits(wrapped)
    assert (
        relative_error(
            second, logits(host_of(ALL_METHODS["dora"], seed=1), adapters=["default"] * 3)
        )
        < 1e-6
    )
    mixed = logits(wrapped, adapter_names=["default", "second", "__base__"])
    base = logits(tiny_model(dtype=torch.float32))
    for row, expected in enumerate((first, second, base)):
        assert relative_error(mixed[row], expected[row]) < 1e-5
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert all(".second." in name for name in trained)


def test_a_deleted_adapter_leaves_the_others():
    wrapped = peft_model()
    first = logits(wrapped)
    wrapped.add_adapter("second", LoraloomConfig(adapter=MIX, seed=1))
    wrapped.set_adapter("second")
    wrapped.delete_adapter("second")
    assert wrapped.active_adapters == ["default"]
    assert torch.equal(logits(wrapped), first)
    assert not any(".second." in name for name in wrapped.state_dict())


def test_the_adapter_that_becomes_active_by_a_deletion_trains():
    wrapped = peft_model()
    wrapped.add_adapter("second", LoraloomConfig(adapter=MIX, seed=1))
    wrapped.delete_adapter("default")
    assert wrapped.active_adapters == ["second"]
    assert any(parameter.requires_grad for parameter in wrapped.parameters())


def test_a_configuration_serves_two_base_models(tmp_path):
    config = LoraloomConfig(adapter=MIX, seed=1)
    for family in ("llama", "phi"):
        wrapped = get_peft_model(tiny_model(family, torch.float32), config)
        wrapped.save_pretrained(tmp_path / family)
        again = PeftModel.from_pretrained(tiny_model(family, torch.float32), tmp_path / family)
        assert torch.equal(logits(again.eval()), logits(wrapped.eval()))


def test_a_configuration_is_read_with_what_the_tensors_say_of_patterns(tmp_path):
    theirs = peft.LoraConfig(
        target_modules=r".*\.(q|v)_proj", r=2, rank_pattern={"model.layers.0.self_attn.q_proj": 3}
    )
    model = get_peft_model(tiny_model(dtype=torch.float32), theirs)
    randomise(model, 3)
    model.save_pretrained(tmp_path)
    config = LoraloomConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path, config=config)
    assert relative_error(logits(again.eval()), logits(model.eval())) < 1e-5


def test_several_adapters_are_saved_and_loaded_each_under_its_name(tmp_path):
    wrapped = peft_model()
    wrapped.add_adapter("second", LoraloomConfig(adapter=ALL_METHODS["mola"], seed=1))
    randomise(wrapped.base_model.host.adapter("second"), 1)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        wrapped.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again), logits(wrapped))


def test_generation_runs_the_active_adapter_in_eval_mode():
    host, wrapped = host_of(changed(MIX, dropout=0.5)), peft_model(changed(MIX, dropout=0.5))
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = host.generate(IDS, adapters=["default"] * 3, **greedy)
    mask = torch.ones_like(IDS)
    wrapped.train()
    assert torch.equal(wrapped.generate(input_ids=IDS, attention_mask=mask, **greedy), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training_the_loss_has_the_auxiliary_loss(checkpointing):
    wrapped, host = peft_model(), host_of()
    if checkpointing:
        wrapped.activation_checkpointing_enable()
    out = wrapped.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    expected = host(IDS, adapters=["default"] * 3, training=True, labels=IDS)
    aux = host.adapter("default").auxiliary_loss(expected.routing["default"])
    (expected.loss + aux).backward()
    assert aux > 0
    assert torch.equal(out.aux_loss, aux)
    theirs = parameter_grads(host.adapter("default"))
    ours = parameter_grads(wrapped.base_model.host.adapter("default"))
    assert all(relative_error(ours[name], theirs[name]) < 1e-6 for name in theirs)


def test_recomputed_layers_fill_no_cache():
    wrapped = peft_model()
    wrapped.activation_checkpointing_enable()
    mask = torch.ones_like(IDS)
    mask[0, -2:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    out = wrapped.train()(input_ids=IDS, attention_mask=mask, labels=labels)
    assert out.past_key_values is None
    out.loss.backward()
    kept = peft_model()
    kept.train()(input_ids=IDS, attention_mask=mask, labels=labels).loss.backward()
    ours, theirs = (
        parameter_grads(one.base_model.host.adapter("default")) for one in (wrapped, kept)
    )
    assert all(relative_error(ours[name], theirs[name]) < 1e-6 for name in theirs)
    with pytest.raises(ModelError, match="with gradient checkpointing fills no cache"):
        wrapped(input_ids=IDS, labels=IDS, past_key_values=DynamicCache())


def test_a_micro_batchs_auxiliary_loss_has_its_share_of_the_steps_labels():
    wrapped = peft_model().train()
    labels = IDS.clone()
    labels[:, :4] = -100  # leaves 3 labels in each of 3 rows
    out = wrapped(input_ids=IDS, labels=labels, num_items_in_batch=36)
    alone = wrapped(input_ids=IDS, labels=labels)
    base = wrapped.base_model.host(IDS, adapters=["default"] * 3, labels=labels).loss
    torch.testing.assert_close(out.loss, base * 9 / 36 + alone.aux_loss * 9 / 36)
    torch.testing.assert_close(alone.loss, base + alone.aux_loss)


def test_tuples_have_the_auxiliary_loss_too():
    wrapped = peft_model().train()
    loss = wrapped(input_ids=IDS, labels=IDS, return_dict=False)[0]
    torch.testing.assert_close(loss, wrapped(input_ids=IDS, labels=IDS).loss)


def test_evaluation_has_the_language_models_loss_alone():
    wrapped, host = peft_model(), host_of()
    with torch.no_grad():
        out = wrapped(input_ids=IDS, labels=IDS)
        assert torch.equal(out.loss, host(IDS, adapters=["default"] * 3, labels=IDS).loss)
    assert "aux_loss" not in out


def test_the_base_model_stays_in_eval_mode():
    wrapped = peft_model().train()
    assert wrapped.training
    assert not any(module.training for module in wrapped.get_base_model().modules())


def test_a_mixture_is_not_merged_and_unload_gives_the_base_model_back():
    base = tiny_model(dtype=torch.float32)
    expected, attributes = logits(base), set(vars(base))
    wrapped = peft_model(model=base)
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
        with pytest.raises(AdapterError, match="a router chooses experts for each token"):
            merge()
    assert wrapped.unload() is base
    assert torch.equal(logits(base), expected)
    assert set(vars(base)) == attributes
    assert all(weight.requires_grad for weight in base.parameters())


def test_what_can_not_be_used_is_refused_and_leaves_the_base_model_alone(tmp_path):
    with pytest.raises(ConfigError, match="adapter must be the configuration of one of loraloom's"):
        LoraloomConfig(adapter=peft.LoraConfig())
    with pytest.raises(ConfigError, match=r"top_k must be in \[1, num_experts=4\]"):
        LoraloomConfig(adapter={"method": "mixlora", "num_experts": 4, "top_k": 9})
    with pytest.raises(ConfigError, match="task_type must be CAUSAL_LM, got 'SEQ_CLS'"):
        LoraloomConfig(adapter=MIX, task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="give it to get_peft_model first"):
        LoraloomConfig(adapter=MIX).save_pretrained(tmp_path)
    base = tiny_model(dtype=torch.float32)
    expected = logits(base)
    with pytest.raises(AdapterError, match="target_modules must name projections"):
        peft_model(MixLoraConfig(target_modules=("nope",)), model=base)
    assert torch.equal(logits(base), expected)
    wrapped = peft_model(model=base)
    with pytest.raises(AdapterError, match="one adapter can be active at a time"):
        wrapped.base_model.set_adapter(["default", "other"])
    with pytest.raises(ModelError, match="every decoder layer, non-reentrantly"):
        wrapped.activation_checkpointing_enable({"use_reentrant": True})


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    peft_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_experts": 5}))
    with pytest.raises(FormatError, match=r"missing tensors: layers\.0\.mlp"):
        PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path)


def test_a_copied_configuration_is_the_same():
    config = LoraloomConfig(adapter=MIX, seed=3)
    assert copy.deepcopy(config) == config
    assert config.to_dict()["adapter"] == MIX.model_dump(mode="json")
    assert LoraloomConfig(adapter=MIX.model_dump()) == LoraloomConfig(adapter=MIX)


def test_push_to_hub_uploads_the_adapters_files(monkeypatch):
    def load_card(*_, **__):
        raise EntryNotFoundError("there is none yet")

    uploaded = []
    monkeypatch.setattr(ModelCard, "load", load_card)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/me/mix")
    )

    def create_commit(self, repo_id, operations, **_):
        uploaded.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    peft_model().push_to_hub("me/mix", token="none")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(uploaded)
