"""A small world in which the commands and programs of the documents run.

`smollm2-135m` is a directory with a tiny random model there, and the data sets, run files and
trained adapters that the documents speak of are tiny too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loraloom.cli.main import main as loraloom_command
from loraloom.data import skills
from loraloom.models import loading
from tests.conftest import build_tokenizer
from tests.tiny import tiny_model

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MODELS = ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct")
TRAINED = ("runs/arc", "runs/night", "runs/sft", "runs/seed0", "runs/seed1", "runs/seed2")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WORDS = ("blue", "one", "two", "yes", "no", "true", "false", "short")


@pytest.fixture
def world(small_world, tmp_path, monkeypatch, methods_as_before):
    """A copy of the small world as the working directory; `smollm2-135m` is its own."""
    shutil.copytree(small_world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setattr(loading, "SMALL_MODEL", "")
    for split in skills.QUESTIONS_PER_SKILL:
        monkeypatch.setitem(skills.QUESTIONS_PER_SKILL, split, 2)
    return tmp_path / "world"


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The files of the small world."""
    directory = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        _save_models()
        _save_data()
        shutil.copytree(EXAMPLES, "examples")
        _train()
    return directory


def _save_models() -> None:
    sizes = {"vocab_size": 300, "max_position_embeddings": 512}
    sizes |= {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of 4-bit weights
    model = tiny_model(dtype=torch.float32, **sizes)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for name in MODELS:
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)


def _save_data() -> None:
    instructions = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS]
    for name in ("alpaca", "math", "law", "physics"):
        _write(Path(f"data/{name}.jsonl"), instructions)
    pairs = [{"prompt": f"Say {word}", "chosen": f" {word}", "rejected": " no"} for word in WORDS]
    _write(Path("data/pairs.jsonl"), pairs)
    prompts = [{"prompt": f"Say {word}"} for word in WORDS]
    _write(Path("prompts.jsonl"), prompts)
    choices = {"text": ["one", "two", "blue"], "label": ["A", "B", "C"]}
    questions = [
        {"id": str(n), "question": f"What is {n}?", "choices": choices, "answerKey": "ABC"[n % 3]}
        for n in range(6)
    ]
    goals = [{"goal": f"Say {n}", "sol1": "one", "sol2": "two", "label": n % 2} for n in range(6)]
    fruit = [{"q": "Which is a fruit?", "options": ["apple", "chair"], "key": 0, "topic": "food"}]
    for split in ("train", "validation", "test"):
        _write(Path(f"data/arc_easy/{split}.jsonl"), questions)
        _write(Path(f"data/piqa/{split}.jsonl"), goals)
        _write(Path(f"tasks/fruit/{split}.jsonl"), fruit)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _train() -> None:
    """Train two adapters for two steps, and put copies wherever documents have trained ones."""
    train = {"batch_size": 4, "max_steps": 2, "max_length": 64}
    data = {"task": "arc_easy", "path": "data", "scoring": "text"}
    adapters = {
        "mix": {"method": "mixlora", "rank": 2, "num_experts": 4, "top_k": 2},
        "lora": {"method": "lora", "rank": 2},
    }
    run = {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "device": "cpu",
        "output_dir": TRAINED[0],
        "jobs": [
            {"name": name, "adapter": adapter, "data": data, "train": train}
            for name, adapter in adapters.items()
        ],
    }
    Path("small.yaml").write_text(yaml.safe_dump(run))
    Path("run.yaml").write_text(yaml.safe_dump({**run, "output_dir": "runs/yaml"}))
    assert loraloom_command(["train", "small.yaml"]) == 0
    _sweep(run["jobs"][1])
    for copy in TRAINED[1:]:
        shutil.copytree(TRAINED[0], copy)


def _sweep(job: dict[str, Any]) -> None:
    """Train two versions of a job."""
    data = {"dataset": "data/math.jsonl", "format": "instruction", "validation_fraction": 0.25}
    sweep = {"job": {**job, "data": data}, "parameters": {"train.learning_rate": [1e-4, 1e-3]}}
    run = {"base_model": MODELS[1], "device": "cpu", "output_dir": "runs/sweep", "sweep": sweep}
    Path("small_sweep.yaml").write_text(yaml.safe_dump(run))
    assert loraloom_command(["train", "small_sweep.yaml"]) == 0
