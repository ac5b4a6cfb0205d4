"""How results were got, so that they can be got again: what stands beside them in the JSON file."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

import loraloom
from loraloom.data.questions import QuestionSet, questions_digest, sha256
from loraloom.eval.identity import SCORING_VERSION, attention
from loraloom.formats.contents import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from loraloom.formats.hub import find_adapter
from loraloom.models.host import Host


def describe_evaluation(
    host: Host, adapters: Mapping[str, str], questions: Sequence[QuestionSet], command: str
) -> dict[str, Any]:
    """Describe the base model, adapters, data, software and machine of an evaluation.

    Args:
        host: With the adapters.
        adapters: Directory or hub id of each by name.
        questions: What was asked.
        command: What it was started with.
    """
    return {
        "base_model": host.base.name_or_path,
        "base_fingerprint": host.base.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "attention": attention(host),
        "adapters": {name: _describe_adapter(path) for name, path in adapters.items()},
        "tasks": {asked.task: describe_questions(asked) for asked in questions},
        "scoring_version": SCORING_VERSION,
        "versions": versions(),
        "device": _describe_device(host.device),
        "platform": platform.platform(),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_questions(asked: QuestionSet) -> dict[str, Any]:
    """Describe a task's questions: how many, scored how, and hashes of them and of their file."""
    return {
        "split": asked.split,
        "scoring": asked.scoring,
        "num_questions": len(asked.questions),
        "questions_sha256": questions_digest(asked.questions),
        "source": asked.source,
    }


def versions() -> dict[str, str]:
    """Versions of what results may depend on."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"loraloom": loraloom.__version__, "python": platform.python_version(), **packages}


def _describe_adapter(path: str) -> dict[str, Any]:
    directory = find_adapter(path)
    weights = WEIGHTS_FILE if (directory / WEIGHTS_FILE).is_file() else PICKLE_FILE
    hashes = {name: sha256(directory / name) for name in (CONFIG_FILE, weights)}
    return {"path": path, "sha256": hashes}


def _describe_device(device: torch.device) -> str:
    """Name the device, an accelerator with its model."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
