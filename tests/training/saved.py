"""A run file for a tiny model and tiny data on the disk."""

from pathlib import Path
from typing import Any

import yaml

from tests.generation.saved import save_tiny, write_rows

WORDS = ("blue", "one", "two", "yes", "no", "true", "false", "short")


def save_inputs(directory: Path, **changes: Any) -> Path:
    """Write `base`, instructions to learn from, and a choice task to be measured on.

    Changes are of the base model's configuration.
    """
    save_tiny(directory, **changes)
    rows = [{"instruction": f"Say {word} {n}", "output": word} for n in (1, 2) for word in WORDS]
    write_rows(directory / "rows.jsonl", *rows)
    pairs = [{"prompt": f"Say {word}", "chosen": f" {word}", "rejected": " no"} for word in WORDS]
    write_rows(directory / "pairs.jsonl", *pairs)
    (directory / "arc_easy").mkdir()
    choices = {"text": ["one", "two", "blue"], "label": ["A", "B", "C"]}
    questions = [
        {"id": str(n), "question": f"What is {n}?", "choices": choices, "answerKey": "ABC"[n % 3]}
        for n in range(5)
    ]
    for split in ("train", "validation"):
        write_rows(directory / "arc_easy" / f"{split}.jsonl", *questions)
    return directory


def run_settings(inputs: Path, output_dir: Path) -> dict[str, Any]:
    """Make a run of two jobs: a LoRA on instructions, and a mixture on a task, measured."""
    train = {"batch_size": 4, "max_steps": 4, "learning_rate": 5e-3, "max_length": 128}
    return {
        "base_model": str(inputs / "base"),
        "device": "cpu",
        "output_dir": str(output_dir),
        "jobs": [
            {
                "name": "plain",
                "adapter": {"method": "lora", "rank": 2, "alpha": 4},
                "data": {
                    "dataset": str(inputs / "rows.jsonl"),
                    "format": "instruction",
                    "validation_fraction": 0.25,
                },
                "train": {**train, "eval_steps": 2},
            },
            {
                "name": "mixture",
                "seed": 1,
                "adapter": {"method": "mixlora", "rank": 2, "alpha": 4, "num_experts": 4},
                "data": {"task": "arc_easy", "path": str(inputs), "scoring": "text"},
                "train": {**train, "micro_batch_size": 2, "save_steps": 1},
                "eval": [{"task": "arc_easy", "path": str(inputs), "scoring": "text"}],
            },
        ],
    }


def write_run_file(path: Path, settings: dict[str, Any]) -> Path:
    """Write settings as YAML."""
    path.write_text(yaml.safe_dump(settings))
    return path
