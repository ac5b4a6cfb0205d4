"""A tiny base model and adapters on the disk."""

import json
from pathlib import Path
from typing import Any

import torch

import loraloom
from tests.conftest import build_tokenizer
from tests.tiny import METHODS, randomise, tiny_model

ADAPTERS = ("lora", "mixlora")


def save_tiny(directory: Path, chat_template: str | None = None, **changes: Any) -> Path:
    """Write `base`, and one adapter directory for each of ADAPTERS, in float32.

    Changes are of the base model's configuration.
    """
    sizes = {"vocab_size": 300, "max_position_embeddings": 256}
    model = tiny_model(dtype=torch.float32, **sizes | changes)
    model.save_pretrained(directory / "base")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory / "base")
    host = loraloom.attach(model)
    for seed, name in enumerate(ADAPTERS):
        randomise(host.add(name, METHODS[name], seed=seed), seed)
        host.save(name, directory / name)
    host.detach()
    return directory


def write_rows(path: Path, *rows: Any) -> str:
    """Write a file of JSON lines, and give its name."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
