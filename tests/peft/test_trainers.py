"""Trainer and trl train what loraloom trains: a PEFT model, or a host's view of an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import loraloom
from loraloom import OptimizerConfig, TrainingClient, example_of
from loraloom.peft import LoraloomConfig
from tests.conftest import build_tokenizer
from tests.tiny import ALL_METHODS, changed, relative_error, tiny_ids, tiny_model

# trl 1.16 uses a name that transformers 5.24 calls deprecated
deprecated = "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(deprecated)

MIX = changed(ALL_METHODS["mixlora"], router_aux_loss_coef=0.5)
IDS = tiny_ids(4, 9)
RATE = 0.1
WAYS = ("peft", "view")
ROWS = Dataset.from_list(
    [{"input_ids": row, "labels": row, "attention_mask": [1] * 9} for row in IDS.tolist()]
)
PAIRS = Dataset.from_list(
    [
        {"prompt": "Say blue:", "chosen": " blue", "rejected": " no"},
        {"prompt": "Say two:", "chosen": " two", "rejected": " one"},
    ]
)
SETTINGS: dict[str, Any] = {
    "optim": "sgd",  # it does not hide a factor of the loss, as Adam would
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
    "bf16": False,
}


def base_model():
    return tiny_model(dtype=torch.float32, vocab_size=300)


def host_of(config=MIX):
    """What a trainer begins with, on a host of its own."""
    host = loraloom.attach(base_model())
    host.add("default", config, seed=0)
    return host


def model_of(way: str, config=MIX):
    """A tiny model with a new adapter, as PEFT's or as a host's view, and the adapter."""
    if way == "peft":
        wrapped = get_peft_model(base_model(), LoraloomConfig(adapter=config, seed=0))
        return wrapped, wrapped.base_model.host.adapter("default")
    host = host_of(config)
    return host.as_model("default"), host.adapter("default")


def trainer_of(model, tmp_path: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(str(tmp_path), **SETTINGS | settings)
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)


def sft_trainer_of(model, tmp_path: Path, **settings: Any) -> SFTTrainer:
    data = {"train_dataset": ROWS, "eval_dataset": ROWS, "processing_class": build_tokenizer()}
    return SFTTrainer(model, SFTConfig(str(tmp_path), **SETTINGS | settings), **data)


def dpo_trainer_of(model, tmp_path: Path, **settings: Any) -> DPOTrainer:
    """PEFT's model switches its adapter off for a reference; a view has another beside it."""
    reference = None if isinstance(model, PeftModel) else model.host.as_model(None)
    data = {"train_dataset": PAIRS, "eval_dataset": PAIRS, "processing_class": build_tokenizer()}
    arguments = DPOConfig(str(tmp_path), **SETTINGS | {"beta": 0.1} | settings)
    return DPOTrainer(model, reference, arguments, **data)


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "Trainer": trainer_of,
    "SFTTrainer": sft_trainer_of,
    "DPOTrainer": dpo_trainer_of,
}
LANGUAGE = ("Trainer", "SFTTrainer")


def weights(adapter) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.tensors().items()}


def trained_by_us(trainer: str, config=MIX) -> dict[str, torch.Tensor]:
    """The weights after two steps of a training client on a trainer's data."""
    settings = OptimizerConfig(optimizer="sgd", learning_rate=RATE, weight_decay=0.0)
    host, tokenizer = loraloom.attach(base_model()), build_tokenizer()
    client = TrainingClient(host, tokenizer, "default", config, settings, seed=0)
    data, objective = [example_of(row, [True] * len(row)) for row in IDS.tolist()], "sft"
    if trainer == "DPOTrainer":
        data, objective = [client.pair(**pair) for pair in PAIRS], "dpo"
    for _ in range(2):
        client.forward_backward(data, objective)
        client.optim_step(max_grad_norm=1.0)
    return weights(client.adapter)


def assert_equal_weights(ours, theirs, tolerance: float = 1e-5):
    assert ours.keys() == theirs.keys()
    worst = {name: relative_error(theirs[name], ours[name]) for name in ours}
    assert max(worst.values()) < tolerance, max(worst.items(), key=lambda item: item[1])


IN_TURN = [("Trainer", "view"), ("SFTTrainer", "peft"), ("DPOTrainer", "peft")]


@pytest.mark.parametrize(
    ("method", "trainer", "way", "checkpointing"),
    [
        *(("mixlora", trainer, way, True) for trainer in TRAINERS for way in WAYS),
        *((method, *IN_TURN[place % 3], False) for place, method in enumerate(ALL_METHODS)),
    ],
)
def test_every_method_is_trained_as_by_our_trainer(method, trainer, way, checkpointing, tmp_path):
    config = ALL_METHODS[method]
    model, adapter = model_of(way, config)
    TRAINERS[trainer](model, tmp_path, activation_checkpointing=checkpointing).train()
    assert model.is_activation_checkpointing is checkpointing
    assert_equal_weights(trained_by_us(trainer, config), weights(adapter))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trainer", LANGUAGE)
def test_the_auxiliary_loss_is_counted_once_whatever_the_accumulation(trainer, way, tmp_path):
    model, _ = model_of(way)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    runs = TRAINERS[trainer](model, tmp_path, **halves)
    runs.train()
    host = host_of()
    with torch.no_grad():
        outputs = [host(half, adapters=["default"] * 2, labels=half) for half in IDS.split(2)]
        language = sum(output.loss for output in outputs) / 2
        losses = [
            host.adapter("default").config.auxiliary_loss(out.routing["default"]) for out in outputs
        ]
    assert float(sum(losses)) > 1
    logged = runs.state.log_history[0]["loss"]
    assert logged == pytest.approx(float(language + sum(losses) / 2), rel=1e-4)


@pytest.mark.parametrize(("trainer", "way"), [("Trainer", "view"), ("SFTTrainer", "peft")])
def test_a_resumed_run_ends_as_an_unbroken_one(trainer, way, tmp_path):
    config = changed(MIX, dropout=0.3)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, unbroken = model_of(way, config)
    TRAINERS[trainer](model, tmp_path, **settings).train()
    model, adapter = model_of(way, config)
    checkpoint = str(tmp_path / "checkpoint-2")
    TRAINERS[trainer](model, tmp_path, **settings).train(resume_from_checkpoint=checkpoint)
    assert_equal_weights(weights(unbroken), weights(adapter), 1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_neftune_disturbs_training_but_no_evaluation(way, tmp_path):
    losses = {}
    for noise in (None, 50.0):
        settings = {"neftune_noise_alpha": noise, "eval_strategy": "steps", "eval_steps": 1}
        runs = trainer_of(model_of(way)[0], tmp_path, max_steps=1, learning_rate=0.0, **settings)
        runs.train()
        trained, evaluated, *_ = runs.state.log_history
        losses[noise] = (trained["loss"], evaluated["eval_loss"])
    assert losses[None][0] != pytest.approx(losses[50.0][0], rel=0.01)
    assert losses[None][1] == losses[50.0][1]


@pytest.mark.parametrize("way", WAYS)
def test_an_adapters_files_are_saved(way, tmp_path):
    model, adapter = model_of(way)
    trainer = trainer_of(model, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path))
    if way == "view":
        assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
        model.save_pretrained(tmp_path)
    host = loraloom.attach(base_model())
    assert_equal_weights(weights(adapter), weights(host.load("a", tmp_path)), 1e-7)


def test_rows_that_trl_packs_train_as_they_do_alone(tmp_path):
    model, adapter = model_of("peft")
    packed = {"packing": True, "max_length": 36, "per_device_train_batch_size": 1}
    sft_trainer_of(model, tmp_path, **packed, eval_packing=False).train()
    assert_equal_weights(trained_by_us("SFTTrainer"), weights(adapter))
