"""Make small copies of what the installed version writes, for the tests of later versions.

    python -m tests.compatibility.make DIRECTORY

Everything is made here: a base model with random weights, its tokenizer, the data, adapters that
`loraloom train` trains, an evaluation by `loraloom eval`, and the logits of all adapters. Only the
run file, the command line and `attach`, which later versions keep, are used. Copies that are in the
repository are never made again: they stand for what users have on their disks.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loraloom
from loraloom.cli.main import main as loraloom_command

WORDS = ("blue", "one", "two", "yes", "no", "true", "false", "short")
METHODS = ("lora", "dora", "mixlora", "mixdora")

RUN_FILE = """\
base_model: base
dtype: float32
device: cpu
output_dir: runs
max_tokens_per_step: 1024
keep_snapshots: 1
trackers: [jsonl]
jobs:
  - name: lora
    adapter: {method: lora, rank: 2, alpha: 4, dropout: 0.05, target_modules: all-linear}
    data: {dataset: rows.jsonl, format: instruction, template: plain, validation_fraction: 0.25}
    train:
      learning_rate: 5.0e-2
      optimizer: adamw
      weight_decay: 0.01
      lr_scheduler: cosine
      warmup_ratio: 0.1
      batch_size: 4
      micro_batch_size: 2
      max_steps: 6
      max_length: 48
      max_grad_norm: 1.0
      eval_steps: 3
      early_stopping: {metric: eval/loss, patience: 5}
  - name: dora
    seed: 1
    priority: 2
    adapter: {method: lora, rank: 2, alpha: 4, weight_decomposition: true, rank_stabilized: true}
    data: {dataset: pairs.jsonl, format: preference}
    train:
      objective: {name: dpo, beta: 0.1, loss_type: sigmoid, reference: base}
      learning_rate: 5.0e-2
      batch_size: 4
      max_steps: 6
  - name: mixlora
    adapter:
      method: mixlora
      rank: 2
      alpha: 4
      num_experts: 4
      top_k: 2
      router_init_std: 1.0
      router_jitter: 0.01
      router_aux_loss_coef: 0.01
      router_loss_scope: pooled
    data: {task: arc_easy, path: ., scoring: text}
    train: {learning_rate: 5.0e-2, batch_size: 4, num_epochs: 2, loraplus_lr_ratio: 4}
    eval: [{task: arc_easy, path: ., split: validation, scoring: text}]
  - name: mixdora
    adapter:
      method: mixlora
      rank: 3
      alpha: 6
      num_experts: 3
      top_k: 2
      experts: {rank: 2, alpha: 4, dropout: 0.05}
      weight_decomposition: true
      router_init_std: 1.0
    data:
      mix:
        - {dataset: rows.jsonl, format: instruction, template: plain, weight: 2}
        - {task: arc_easy, path: ., scoring: text}
      validation: {dataset: rows.jsonl, format: instruction, template: plain}
    train: {learning_rate: 2.0e-2, batch_size: 4, max_steps: 4, packing: true, max_length: 128}
"""


def main(directory: Path) -> None:
    """Make all files in a new directory."""
    directory.mkdir(parents=True)
    os.chdir(directory)
    torch.set_num_threads(1)
    save_base_model()
    save_data()
    Path("run.yaml").write_text(RUN_FILE)
    check(["train", "run.yaml"])
    check(
        ["eval", "--base-model", "base", "--task", "arc_easy", "--scoring", "text", "--data", "."]
        + ["--device", "cpu", "--no-cache", "--output", "evaluation.json"]
        + ["--output", "evaluation.csv", "--per-question", "answers.jsonl"]
        + [f"--adapter={name}=runs/{name}" for name in METHODS]
    )
    save_logits()
    shutil.rmtree("runs/.checkpoints")
    for name in METHODS[1:]:
        shutil.rmtree(f"runs/{name}/checkpoints")


def check(arguments: list[str]) -> None:
    """Run a verb of the command line, which must succeed."""
    sys.argv = ["loraloom", *arguments]  # what the results say they were made with
    if code := loraloom_command(arguments):
        raise SystemExit(code)


def save_base_model() -> None:
    """Write a Llama of some 30,000 random weights and a tokenizer of bytes to `base`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained("base")
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    model.to(torch.bfloat16).save_pretrained("base")


def save_data() -> None:
    """Write instructions, preferences and a choice task."""
    rows = [{"instruction": f"Say {word} {n}", "output": word} for n in (1, 2) for word in WORDS]
    write_lines(Path("rows.jsonl"), rows)
    pairs = [{"prompt": f"Say {word}", "chosen": f" {word}", "rejected": " no"} for word in WORDS]
    write_lines(Path("pairs.jsonl"), pairs)
    choices = {"text": ["one", "two", "blue"], "label": ["A", "B", "C"]}
    for split, count in (("train", 8), ("validation", 5), ("test", 7)):
        questions = [
            {"id": f"{split}-{n}", "question": f"What is {n}?"}
            | {"choices": choices, "answerKey": "ABC"[n % 3]}
            for n in range(count)
        ]
        write_lines(Path("arc_easy", f"{split}.jsonl"), questions)


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def save_logits() -> None:
    """Write what the base model and each adapter compute for a few tokens."""
    model = LlamaForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    host = loraloom.attach(model)
    for name in METHODS:
        host.load(name, f"runs/{name}")
    ids = torch.tensor([[30, 70, 31, 200, 90]])
    logits = {"input_ids": ids}
    with torch.no_grad():
        for name in (None, *METHODS):
            logits[name or "base"] = host(input_ids=ids, adapters=[name]).logits[0]
    save_file(logits, "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
