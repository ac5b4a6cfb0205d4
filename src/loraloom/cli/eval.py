"""`loraloom eval`: how well the base model and its adapters answer questions, or predict rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from loraloom.cli.eval_options import EvalRun
from loraloom.cli.scoring import score_choices, score_harness, score_held_out


def evaluate(run: Annotated[EvalRun, Parameter(name="*")]) -> None:
    """Score choice questions, or held-out rows, with the base model and adapters, all in one pass.

    Scores of --task and --dataset are kept: after Ctrl-C the same command goes on where it was.
    """
    run.check_options()
    if run.kind == "--harness":
        score_harness(run, split_names(run.harness))
    elif run.kind == "--dataset":
        score_held_out(run, list(dict.fromkeys(run.dataset)))
    else:
        score_choices(run, split_names(run.task))


def split_names(values: Sequence[str]) -> list[str]:
    """Names of `--task a,b --task c`, each once."""
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))
