"""Measuring jobs while they train: their objective on held-out examples, and choice tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from loraloom.data.tasks import ChoiceQuestion, load_question_set
from loraloom.data.tokens import Example
from loraloom.eval.score import score_accuracy
from loraloom.generation.scoring import label_log_probs
from loraloom.models.host import Host
from loraloom.training.job import Job
from loraloom.training.settings import EvaluationConfig, JobConfig
from loraloom.training.step.objectives import ScoredSamples, ask_references
from loraloom.training.step.window import count_totals


@dataclass
class Evaluation:
    """Everything that jobs are measured on, read before training begins."""

    host: Host
    tokenizer: PreTrainedTokenizerBase
    questions: dict[EvaluationConfig, list[ChoiceQuestion]] = field(default_factory=dict)

    @property
    def pad_id(self) -> int:
        """Token to pad with."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def read(self, job: JobConfig) -> None:
        """Read the questions that a job is measured on."""
        for config in job.eval:
            if config in self.questions:  # those of a run stay, whatever becomes of the files
                continue
            self.questions[config] = load_question_set(
                config.task, config.scoring, config.split, config.path, config.limit
            ).questions

    def measure(self, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
        """Measure jobs together: `eval/loss`, and `eval/<task>/accuracy` for each task.

        An objective's own metrics come as `eval/<name>` too.
        """
        metrics: dict[str, dict[str, float]] = {job.name: {} for job in jobs}
        for name, held_out in self._held_out(jobs).items():
            metrics[name] |= held_out
        for evaluation in dict.fromkeys(task for job in jobs for task in job.config.eval):
            names = [job.name for job in jobs if evaluation in job.config.eval]
            questions = self.questions[evaluation]
            accuracies = score_accuracy(self.host, self.tokenizer, questions, names)
            for name in names:
                metrics[name][evaluation.metric] = accuracies[name]
        return metrics

    def measure_apart(self, jobs: Sequence[Job]) -> list[dict[str, float] | Exception]:
        """Measure jobs together; if that fails, each alone, to find whose fault it is."""
        try:
            measured = self.measure(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [outcome for job in jobs for outcome in self.measure_apart([job])]
        return [measured[job.name] for job in jobs]

    def _held_out(self, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
        """Compute each job's objective on its held-out examples, as one step of it would."""
        rows = {
            job.name: [row for example in job.training_set.validation for row in example.rows]
            for job in jobs
            if job.training_set.validation
        }
        measured = [job for job in jobs if job.name in rows]
        ask_references(self.host, [(job.reference, rows[job.name]) for job in measured])
        named_rows = [(name, row) for name in rows for row in rows[name]]
        log_probs = iter(label_log_probs(self.host, named_rows))
        return {
            job.name: _objective_metrics(
                job, rows[job.name], [next(log_probs) for _ in rows[job.name]]
            )
            for job in measured
        }


def _objective_metrics(
    job: Job, rows: Sequence[Example], log_probs: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Name a job's objective on samples, and its metrics."""
    references = None
    if job.reference is not None:
        references = torch.tensor(job.reference.of(rows), dtype=torch.float64)
    scored = ScoredSamples(torch.cat(list(log_probs)), list(map(len, log_probs)), references)
    terms = job.objective.terms(scored, count_totals(job.training_set.validation))
    values = {"loss": terms.loss, **terms.metrics}
    return {f"eval/{name}": float(value) for name, value in values.items()}
