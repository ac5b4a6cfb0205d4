"""Make small copies of what the installed version writes, for the tests of later versions.

    python -m tests.compatibility.make DIRECTORY

Base model, data and run file are those of v0; adapters that `loraloom train` trains, an evaluation
by `loraloom eval` and the logits of all adapters are made here. Copies that are in the repository
are never made again: they stand for what users have on their disks.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import loraloom
from loraloom.cli.main import main as loraloom_command

FIRST = Path(__file__).parent / "v0"
METHODS = ("lora", "dora", "mixlora", "mixdora")


def main(directory: Path) -> None:
    """Make all files in a new directory."""
    results = ("runs", "evaluation.*", "answers.jsonl", "logits.safetensors")
    shutil.copytree(FIRST, directory, ignore=shutil.ignore_patterns(*results))
    os.chdir(directory)
    torch.set_num_threads(1)
    check(["train", "run.yaml"])
    check(
        ["eval", "--base-model", "base", "--task", "arc_easy", "--scoring", "text", "--data", "."]
        + ["--device", "cpu", "--no-cache", "--output", "evaluation.json"]
        + ["--output", "evaluation.csv", "--per-question", "answers.jsonl"]
        + [f"--adapter={name}=runs/{name}" for name in METHODS]
    )
    host = loraloom.attach(LlamaForCausalLM.from_pretrained("base", dtype=torch.float32).eval())
    ids = torch.tensor([[30, 70, 31, 200, 90]])
    logits = {"input_ids": ids}
    with torch.no_grad():
        for name in METHODS:
            host.load(name, f"runs/{name}")
        for name in (None, *METHODS):
            logits[name or "base"] = host(input_ids=ids, adapters=[name]).logits[0]
    save_file(logits, "logits.safetensors")
    shutil.rmtree("runs/.checkpoints")
    for name in METHODS[1:]:
        shutil.rmtree(f"runs/{name}/checkpoints")


def check(arguments: list[str]) -> None:
    """Run a verb of the command line, which must succeed."""
    sys.argv = ["loraloom", *arguments]  # what the results say they were made with
    if code := loraloom_command(arguments):
        raise SystemExit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
