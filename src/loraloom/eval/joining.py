"""Evaluations of different adapters on the same questions or rows, put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from loraloom.eval.answers import answers_of
from loraloom.eval.comparison import Pair, compare_all, summarise_seeds
from loraloom.eval.evaluation import Evaluation
from loraloom.eval.loss import LossEvaluation, compare_rows
from loraloom.eval.results import BASE, TaskScores

Name = TypeVar("Name")
Value = TypeVar("Value")


def join_evaluations(
    parts: Sequence[Evaluation], names: Sequence[str | None], pairs: Sequence[Pair]
) -> Evaluation:
    """Make one evaluation of several, as if all adapters had been scored together."""
    scored = [
        TaskScores(task.task, task.split, _joined((p.tasks[place].scores for p in parts), names))
        for place, task in enumerate(parts[0].tasks)
    ]
    answers = [answers_of(task) for task in scored]
    details = _join_details([part.details for part in parts], names)
    return Evaluation(scored, summarise_seeds(answers), compare_all(answers, pairs), details)


def join_losses(
    parts: Sequence[LossEvaluation], names: Sequence[str | None], pairs: Sequence[Pair]
) -> LossEvaluation:
    """Make one evaluation of held-out loss of several; see `join_evaluations`."""
    known = [name or BASE for name in names]
    losses = [
        replace(one, losses=_joined((part.losses[place].losses for part in parts), known))
        for place, one in enumerate(parts[0].losses)
    ]
    details = _join_details([part.details for part in parts], names)
    return LossEvaluation(losses, compare_rows(losses, pairs), details)


def _join_details(
    parts: Sequence[Mapping[str, Any]], names: Sequence[str | None]
) -> dict[str, Any]:
    by_adapter = {
        field: _joined((part[field] for part in parts), names) for field in ("routing", "adapters")
    }
    num_cached = sum(part["num_cached_scores"] for part in parts)
    return {**parts[0], **by_adapter, "num_cached_scores": num_cached}


def _joined(parts: Iterable[Mapping[Name, Value]], names: Sequence[Name]) -> dict[Name, Value]:
    found = {name: value for part in parts for name, value in part.items()}
    return {name: found[name] for name in names if name in found}
