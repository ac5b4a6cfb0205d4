"""loraloom's adapters in the trainers of others: transformers' Trainer, trl's SFT and DPO trainers.

Trainer takes a host's view of an adapter, trl a PEFT model; either takes both. The base model is a
tiny one with random weights, so this takes seconds and no download.

    pip install 'loraloom[peft]' trl
    python examples/trainers.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import loraloom
from loraloom import MixLoraConfig
from loraloom.peft import LoraloomConfig

MIXTURE = MixLoraConfig(rank=4, alpha=8, num_experts=4, top_k=2)
SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 8,
    "max_steps": 30,
    "logging_first_step": True,
    "logging_steps": 30,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of letters and digits."""
    letters = {letter: place for place, letter in enumerate("~.?0123456789abcdefghij")}
    tokenizer = Tokenizer(WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="~", eos_token=".", unk_token="?"
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make a model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def train_with_trainer(tokenizer: PreTrainedTokenizerFast, directory: str) -> Trainer:
    """Train an adapter on a host; others on the same host are left alone."""
    host = loraloom.attach(tiny_model(tokenizer))
    host.add("counts", MIXTURE, seed=0)
    rows = [tokenizer(f"{letter}1234.")["input_ids"] for letter in "abcdefgh"]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    trainer = Trainer(
        host.as_model("counts"),
        TrainingArguments(directory, **SETTINGS),
        train_dataset=data,
    )
    trainer.train()
    host.save("counts", f"{directory}/counts")
    return trainer


def train_with_sft(tokenizer: PreTrainedTokenizerFast, directory: str) -> SFTTrainer:
    """Train a PEFT model on answers; the mixture's balance loss is in trl's as `aux_loss`."""
    model = get_peft_model(tiny_model(tokenizer), LoraloomConfig(adapter=MIXTURE, seed=0))
    data = [{"prompt": letter, "completion": "1234"} for letter in "abcdefgh"]
    trainer = SFTTrainer(
        model,
        SFTConfig(directory, **SETTINGS),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(f"{directory}/answers")
    return trainer


def train_with_dpo(tokenizer: PreTrainedTokenizerFast, directory: str) -> DPOTrainer:
    """Train a PEFT model on preferences, with itself as it began for a reference."""
    data = [{"prompt": letter, "chosen": "22", "rejected": "99"} for letter in "abcdefgh"]
    trainer = DPOTrainer(
        tiny_model(tokenizer),
        args=DPOConfig(directory, **SETTINGS),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=LoraloomConfig(adapter=MIXTURE, seed=0),
    )
    trainer.train()
    return trainer


def main() -> None:
    """Run all three, and print the losses of their first and their last steps."""
    tokenizer = tiny_tokenizer()
    for train in (train_with_trainer, train_with_sft, train_with_dpo):
        with tempfile.TemporaryDirectory() as directory:
            trainer = train(tokenizer, directory)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{type(trainer).__name__}: loss {losses[0]:.2f}, then {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
