"""A run and its evaluation as files, made up: no model is needed."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("arc_easy", "piqa")
NUM_LAYERS, NUM_EXPERTS = 6, 8
LAYERS = (0, 3, 5)
TOKENS = ("Question", ":", " Which", " is", " hot", "?", "\n", "Answer", ":")


def write_run(path: Path, jobs: Sequence[str] = ("mix", "lora"), num_steps: int = 40) -> Path:
    """Write a run's directory."""
    for place, name in enumerate(jobs):
        directory = path / name
        directory.mkdir(parents=True)
        lines = [*_steps(num_steps, place), {"step": num_steps, "eval/arc_easy/accuracy": 0.5}]
        (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (directory / "result.json").write_text(json.dumps(job_result(name, num_steps)))
    return path


def _steps(num_steps: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [
        {
            "step": step,
            "epoch": step / num_steps,
            "loss": 2 + math.exp(-step / 10) + generator.uniform(-0.2, 0.2),
            "learning_rate": 1e-3 * (1 - step / num_steps),
            "tokens": 100 * step,
            "seconds": 2.0 * step,
        }
        for step in range(1, num_steps + 1)
    ]


def job_result(name: str, num_steps: int, **changes: Any) -> dict[str, Any]:
    """What result.json says."""
    return {
        "job": name,
        "status": "finished",
        "error": None,
        "method": "MixLoRA" if name.startswith("mix") else "LoRA",
        "base_model": "a/base",
        "num_parameters": 13_200_000,
        "steps": num_steps,
        "epochs": 1.0,
        "tokens": 4000,
        "weights": "best",
        "metrics": {"eval/loss": 2.5},
        "seconds": 80.0,
        "peak_memory_bytes": {"rss": 2**31},
        "environment": {"versions": {"loraloom": "0.1.0"}, "command": "loraloom train run.yaml"},
    } | changes


def evaluation(
    adapters: Sequence[str] = ("mix", "lora"), tasks: Sequence[str] = TASKS
) -> dict[str, Any]:
    """What `loraloom eval --output` writes."""
    names = ["base", *adapters]
    compared = {"first": adapters[0], "second": "base", "difference": 0.2, "stderr": 0.07}
    compared |= {"interval": [0.1, 0.3], "p_value": 0.0004, "adjusted_p_value": 0.012}
    compared |= {"num_first_better": 10, "num_second_better": 2, "num_examples": 40}
    return {
        "schema_version": 1,
        "results": {name: {task: _accuracy(name, task) for task in tasks} for name in names},
        "seeds": {},
        "comparisons": [{"task": task, **compared} for task in tasks],
        "routing": {n: routing(tasks, n) for n in adapters if n.startswith("mix")},
        "base_model": "a/base",
        "dtype": "bfloat16",
        "tasks": {task: {"scoring": "text", "num_questions": 40} for task in tasks},
        "versions": {"loraloom": "0.1.0"},
        "command": "loraloom eval --task arc_easy",
        "date": "2026-01-02T03:04:05+00:00",
    }


def _accuracy(name: str, task: str) -> dict[str, Any]:
    accuracy = random.Random(f"{name} {task}").uniform(0.3, 0.6)
    interval = [accuracy - 0.1, accuracy + 0.1]
    return {"accuracy": accuracy, "stderr": 0.05, "interval": interval, "num_examples": 40}


def routing(tasks: Sequence[str] = TASKS, seed: object = 0) -> dict[str, Any]:
    """A mixture's routing."""
    generator = random.Random(str(seed))
    topics = [0.5] * NUM_LAYERS
    return {
        "num_experts": NUM_EXPERTS,
        "top_k": 2,
        "layers": list(range(NUM_LAYERS)),
        "tasks": {task: _task_routing(generator) for task in tasks},
        "specialisation": {"topics": {"bits": topics, "of": dict.fromkeys(tasks, topics)}},
        "warnings": [],
    }


def _task_routing(generator: random.Random) -> dict[str, Any]:
    weights = [[generator.expovariate(1) for _ in range(NUM_EXPERTS)] for _ in range(NUM_LAYERS)]
    experts = {str(n): [generator.randrange(NUM_EXPERTS) for _ in TOKENS] for n in LAYERS}
    return {
        "num_questions": 40,
        "num_questions_covered": 40,
        "num_tokens": 1000,
        "load": [[weight / sum(of_layer) for weight in of_layer] for of_layer in weights],
        "effective_experts": [7.0] * NUM_LAYERS,
        "mean_entropy_bits": [2.9] * NUM_LAYERS,
        "token_entropy_bits": [2.5] * NUM_LAYERS,
        "example": {"tokens": list(TOKENS), "experts": experts},
    }


def write_evaluation(path: Path, content: dict[str, Any] | None = None) -> Path:
    """Write an evaluation's JSON file."""
    path.write_text(json.dumps(content or evaluation()))
    return path
