"""Measuring jobs while they train: the loss on held-out examples, and choice tasks.

Choice tasks are scored by a function from outside, so that training does not know how.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from loraloom.config.run import EvaluationConfig, JobConfig
from loraloom.data.examples import ChoiceQuestion, Example, collate
from loraloom.data.questions import load_questions
from loraloom.models.host import Host
from loraloom.train.job import Job
from loraloom.train.step import label_losses
from loraloom.train.window import count_labels

MAX_TOKENS_PER_BATCH = 4096

Evaluator = Callable[
    [Host, PreTrainedTokenizerBase, Sequence[ChoiceQuestion], Sequence[str]], Mapping[str, float]
]
"""From questions and names of adapters to each adapter's accuracy."""


@dataclass
class Evaluation:
    """Everything that jobs are measured on, read before training begins.

    Args:
        host: With the jobs' adapters.
        tokenizer: The base model's.
        evaluator: What scores choice questions; needed if a job names a task.
        questions: Of each evaluation that a job names.
    """

    host: Host
    tokenizer: PreTrainedTokenizerBase
    evaluator: Evaluator
    questions: dict[EvaluationConfig, list[ChoiceQuestion]] = field(default_factory=dict)

    @property
    def pad_id(self) -> int:
        """Token to pad with."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def read(self, jobs: Sequence[JobConfig]) -> None:
        """Read the questions of all jobs, each set once.

        Raises:
            DataError: If they are missing or can't be used.
        """
        for one in {evaluation: None for job in jobs for evaluation in job.eval}:
            self.questions[one] = load_questions(
                one.task, one.scoring, one.split, one.path, one.limit
            )

    def measure(self, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
        """Measure jobs together: `eval/loss`, and `eval/<task>/accuracy` for each of its tasks."""
        self.host.eval()
        metrics: dict[str, dict[str, float]] = {job.name: {} for job in jobs}
        for name, loss in self._losses(jobs).items():
            metrics[name]["eval/loss"] = loss
        for evaluation, names in _by_evaluation(jobs).items():
            questions = self.questions[evaluation]
            accuracies = self.evaluator(self.host, self.tokenizer, questions, names)
            for name in names:
                metrics[name][evaluation.metric] = accuracies[name]
        return metrics

    def _losses(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Compute the mean loss of a label on each job's held-out examples."""
        rows = [(job.name, example) for job in jobs for example in job.training_set.validation]
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for batch in _batches(rows):
            for (name, example), loss in zip(batch, self._row_losses(batch), strict=True):
                sums[name] += loss
                counts[name] += count_labels(example)
        return {name: sums[name] / max(counts[name], 1) for name in sums}

    @torch.no_grad()
    def _row_losses(self, rows: Sequence[tuple[str, Example]]) -> list[float]:
        batch = collate([example for _, example in rows], self.pad_id)
        device = self.host.device
        output = self.host.hidden(
            batch.input_ids.to(device), batch.attention_mask.to(device), [name for name, _ in rows]
        )
        losses = label_losses(self.host, output.last_hidden_state, batch.labels)
        parts = losses.double().cpu().split([count_labels(example) for _, example in rows])
        return [float(part.sum()) for part in parts]


def _by_evaluation(jobs: Sequence[Job]) -> dict[EvaluationConfig, list[str]]:
    """Group jobs that are measured on the same questions."""
    names: dict[EvaluationConfig, list[str]] = {}
    for job in jobs:
        for evaluation in job.config.eval:
            names.setdefault(evaluation, []).append(job.name)
    return names


def _batches(rows: Sequence[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    """Cut rows into batches of like lengths, each adapter's rows together."""
    batch: list[tuple[str, Example]] = []
    for row in sorted(rows, key=lambda row: -len(row[1].input_ids)):
        longest = len((batch or [row])[0][1].input_ids)
        if batch and longest * (len(batch) + 1) > MAX_TOKENS_PER_BATCH:
            yield sorted(batch, key=lambda row: row[0])
            batch = []
        batch.append(row)
    if batch:
        yield sorted(batch, key=lambda row: row[0])
