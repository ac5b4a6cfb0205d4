"""lm-eval's own evaluation of several adapters, whose requests share batches."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, cast
from unittest.mock import patch

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from loraloom.eval.harness.lm import shared_lms
from loraloom.models.host import Host

Results = dict[str, Any]
"""What `lm_eval.simple_evaluate` returns."""


def evaluate_adapters(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task | Group],
    adapters: Sequence[str | None],
    *,
    lm_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str | None, Results]:
    """Evaluate adapters on tasks: the same results as one by one, computed in the same batches."""
    models = shared_lms(host, tokenizer, adapters, **(lm_options or {}))
    manager = TaskManager(include_defaults=False)  # the tasks are there, so none is looked up
    evaluate = cast("Any", lm_eval.simple_evaluate)  # its decorator hides what it takes
    # lm-eval's own lets git complain on stderr where the working directory is no repository
    with patch("lm_eval.evaluator.get_git_commit_hash", _git_commit):
        return {
            name: evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
            for name, model in models.items()
        }


def _git_commit() -> str | None:
    """The commit of the working directory; None where there is none to tell."""
    try:
        told = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None
