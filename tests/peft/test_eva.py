"""`init: eva` held to PEFT's `initialize_lora_eva_weights`."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights

import loraloom
from loraloom import AdapterError, ConfigError, EvaConfig, LoraConfig
from loraloom.adapters.lora import eva
from loraloom.config.job import JobConfig
from loraloom.data.examples import NO_LOSS
from loraloom.training.run.builder import JobBuilder
from loraloom.training.run.evaluation import Evaluation
from loraloom.training.run.start import start_batches
from tests.tiny import padded_mask, randomise, tiny_ids, tiny_model
from tests.training.toy import PAD_ID, toy_host, toy_set, toy_tokenizer

# peft 0.21 asks transformers 5.24 in a way that the latter calls deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning"),
]


def batches(count: int = 3):
    """Rows with padding, whose first tokens are not learnt."""
    for seed in range(count):
        ids = tiny_ids(8, 9, seed)
        mask = padded_mask([9, 8, 7, 6, 9, 9, 5, 9], length=9)
        labels = ids.masked_fill(mask == 0, NO_LOSS)
        labels[:, :2] = NO_LOSS
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch_list():
    return list(batches())


CHOICES = {
    "defaults": LoraConfig(rank=3, alpha=6, init="eva"),
    "one rank": LoraConfig(rank=4, init="eva", eva=EvaConfig(rho=1)),
    "others": LoraConfig(
        rank=2,
        init="eva",
        target_modules="attention",
        rank_stabilized=True,
        weight_decomposition=True,
        rank_pattern={"q_proj": 4},
        eva=EvaConfig(rho=3, whiten=True, use_label_mask=False, adjust_scaling_factors=False),
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_ranks_directions_and_scales_are_those_of_peft(choice):
    config = CHOICES[choice]
    host = loraloom.attach(tiny_model(dtype=torch.float32))
    adapter = host.add("a", config, batches=batch_list())
    targets = list(adapter.layers[0]["self_attn"])
    targets += [] if config.target_modules == "attention" else list(adapter.layers[0]["mlp"])
    theirs = get_peft_model(
        tiny_model(dtype=torch.float32),
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=int(config.alpha),
            target_modules=targets,
            rank_pattern=dict(config.rank_pattern),
            use_rslora=config.rank_stabilized,
            use_dora=config.weight_decomposition,
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(**config.eva.model_dump()),
        ),
    )
    initialize_lora_eva_weights(theirs, batch_list(), show_progress_bar=False)
    found = 0
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            key = name.removeprefix("base_model.model.model.")
            lora_A = adapter.tensors()[f"{key}.lora_A"]
            torch.testing.assert_close(lora_A, module.lora_A["default"].weight.data)
            assert adapter.config.at(key).scaling == pytest.approx(module.scaling["default"])
            assert adapter.tensors()[f"{key}.lora_B"].abs().max() == 0
            found += 1
    assert found == sum(name.endswith("lora_A") for name in adapter.tensors())


def test_what_started_from_data_is_saved_as_any_lora(tmp_path):
    host = loraloom.attach(tiny_model(dtype=torch.float32))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    adapter = randomise(host.add("a", CHOICES["defaults"], batches=batch_list()))
    assert torch.equal(torch.get_rng_state(), before)
    host.save("a", tmp_path)
    again = host.load("b", tmp_path)
    assert again.config.init == "kaiming"
    assert again.config.rank_pattern == adapter.config.rank_pattern != {}
    names = ["a"] * 3, ["b"] * 3
    one, two = (host(tiny_ids(3), adapters=rows).logits for rows in names)
    assert torch.equal(one, two)


def test_batches_have_the_learnt_tokens_that_are_asked_for():
    batches = start_batches(toy_set(), 12, PAD_ID, torch.device("cpu"))
    assert len(batches) > 1
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        is_learnt = labels != NO_LOSS
        assert int(is_learnt.sum()) >= 12
        assert torch.equal(ids[is_learnt], labels[is_learnt])
        assert not is_learnt[:, :2].any()
        assert not (is_learnt & (batch["attention_mask"] == 0)).any()


def test_a_job_starts_from_its_own_data_and_so_does_a_resumed_one(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{word} and so on"}}\n' for word in ("one", "two", "six")))
    settings = {
        "name": "a",
        "adapter": {"method": "lora", "rank": 2, "init": "eva"},
        "data": {"dataset": str(rows), "format": "text"},
        "train": {"max_steps": 1, "max_length": 32},
    }

    def built(**sections):
        host, tokenizer = toy_host(), toy_tokenizer()
        builder = JobBuilder(host, tokenizer, Evaluation(host, tokenizer))
        return builder.build(JobConfig.model_validate(settings | sections)).adapter

    first, second = built(), built()
    assert first.config == second.config
    assert first.config.rank_pattern
    tensors = second.tensors()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in first.tensors().items())
    with pytest.raises(ConfigError, match=r"read whole, got data\.streaming"):
        built(data={**settings["data"], "streaming": True})
    with pytest.raises(ConfigError, match="start_from takes the place of initial weights"):
        built(start_from="some/adapter")


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (LoraConfig(init="eva"), batch_list(), "rho × rank = 32 tokens to look at"),
        (CHOICES["defaults"], [], "got 0; give more data"),
    ],
)
def test_too_little_data_is_refused(config, given, message):
    host = loraloom.attach(tiny_model(dtype=torch.float32))
    with pytest.raises(ConfigError, match=message):
        host.add("a", config, batches=[{k: v[:2] for k, v in batch.items()} for batch in given])
    assert host.adapters == {}


def test_without_data_it_says_what_to_do():
    host = loraloom.attach(tiny_model())
    with pytest.raises(AdapterError, match="starts from training data, got none; give batches"):
        host.add("a", CHOICES["defaults"])


def test_a_start_that_fails_leaves_the_base_model_as_it_was(monkeypatch):
    host = loraloom.attach(tiny_model(dtype=torch.float32))
    before = {module: [*module._forward_hooks] for module in host.model.modules()}
    monkeypatch.setattr(eva, "_MOST_FORWARDS", -2)
    with pytest.raises(ConfigError, match="settle"):
        host.add("a", CHOICES["defaults"], batches=batch_list())
    assert {module: [*module._forward_hooks] for module in host.model.modules()} == before
    monkeypatch.undo()
    host.add("a", CHOICES["defaults"], batches=batch_list())
