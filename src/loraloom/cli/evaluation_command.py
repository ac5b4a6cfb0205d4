"""The commands that evaluate and ask what a run has trained."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraloom.config.data import SourceConfig
from loraloom.config.model import quantization_option
from loraloom.training.settings import (
    DpoConfig,
    EvaluationConfig,
    JobConfig,
    RunConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from loraloom.training.results import JobResult

MAX_ADAPTERS = 8
"""Adapters in the command; of a sweep the best ones."""

DEFAULT_BETA = DpoConfig.model_fields["beta"].default
"""What eval takes for preferences."""

PROMPT = "Hello!"
"""Stands for what the user would ask."""

HELD_OUT = "HELD_OUT.jsonl"
"""Stands for a file of rows that no job has seen, where the run has none."""


def evaluation_command(run: RunConfig, results: Sequence[JobResult]) -> str | None:
    """Write the command, an option a line; None where there is nothing to evaluate.

    It asks what the first job that can be asked was measured on, or what it learnt from where that
    has other splits. Adapters of jobs that would be asked something else are left out.
    """
    good = _good(run, results)
    asked = {one.job: [*_asked(job)] for one in good if (job := _find_job(run, one.job))}
    first = next(filter(None, asked.values()), None)
    if first is None:
        return None
    adapters = [one for one in good if asked.get(one.job) == first]
    output = f"--output {shlex.quote(str(run.output_dir / 'eval.json'))}"
    return _command("eval", run, adapters, " ".join(first), output)


def generation_command(run: RunConfig, results: Sequence[JobResult]) -> str | None:
    """Write the command that asks what was trained, an option a line; None if nothing was."""
    good = _good(run, results)
    return _command("generate", run, good, f"--prompt {shlex.quote(PROMPT)}") if good else None


def _good(run: RunConfig, results: Sequence[JobResult]) -> list[JobResult]:
    """Results of jobs that got to their end; of a sweep the best ones first."""
    good = [result for result in results if result.error is None and result.status != "stopped"]
    if run.sweep is not None:
        from loraloom.training.job import metric_mode  # with torch, which is there by now

        metric = run.sweep.metric
        sign = 1 if metric_mode(metric) == "min" else -1
        good.sort(key=lambda one: sign * one.metrics.get(metric, sign * float("inf")))
    return good


def _command(verb: str, run: RunConfig, adapters: Sequence[JobResult], *options: str) -> str:
    base = f"--base-model {shlex.quote(run.base_model)} {quantization_option(run.quantization)}"
    named = (
        f"--adapter {shlex.quote(f'{_adapter_name(one.job)}={one.directory}')}"
        for one in adapters[:MAX_ADAPTERS]
    )
    return " \\\n    ".join([f"loraloom {verb} {base}".rstrip(), *named, *options])


def _adapter_name(job: str) -> str:
    """A job may be called as evaluations call the base model."""
    from loraloom.eval.results import BASE

    return f"{job}-adapter" if job == BASE else job


def _find_job(run: RunConfig, name: str) -> JobConfig | None:
    """The job of that name; TPE's later ones differ from a sweep's first one in values."""
    owns = (lambda _: False) if run.sweep is None else run.sweep.owns
    alike = (job for job in run.all_jobs if owns(name) and owns(job.name))
    return next((job for job in run.all_jobs if job.name == name), next(alike, None))


def _asked(job: JobConfig) -> Iterator[str]:
    """The options that say what is asked."""
    sources = [job.data.validation] if job.data.validation is not None else job.data.sources
    tasks = [one for one in (*job.eval, *sources) if one.task is not None]
    if tasks:
        yield from _task_options(tasks)
    else:
        has_rows = job.data.validation is not None
        if has_rows and sources[0].config is not None:  # eval can't be told it
            return
        yield from _data_options(sources[0], has_rows=has_rows)
        if job.train.max_length != TrainConfig.model_fields["max_length"].default:
            yield f"--max-length {job.train.max_length}"
        beta = getattr(job.train.objective, "beta", DEFAULT_BETA)
        if beta != DEFAULT_BETA:
            yield f"--beta {beta}"


def _task_options(tasks: Sequence[EvaluationConfig | SourceConfig]) -> Iterator[str]:
    """Tasks that are scored as the first one is; their data must be in one place."""
    first = tasks[0]
    alike = [one for one in tasks if (one.scoring, one.path) == (first.scoring, first.path)]
    yield f"--task {shlex.quote(','.join(dict.fromkeys(str(one.task) for one in alike)))}"
    if first.scoring is not None:  # else a task file's own
        yield f"--scoring {first.scoring}"
    if first.path is not None:
        yield f"--data {shlex.quote(first.path)}"


def _data_options(source: SourceConfig, *, has_rows: bool) -> Iterator[str]:
    yield f"--dataset {shlex.quote(str(source.dataset)) if has_rows else HELD_OUT}"
    if has_rows and source.split is not None:
        yield f"--split {shlex.quote(source.split)}"
    yield f"--format {source.format}"
    if source.template is not None:
        yield f"--template {shlex.quote(source.template)}"
    if source.chat_template is not None:
        yield f"--chat-template {shlex.quote(source.chat_template)}"
    for role, column in (source.fields or {}).items():
        yield f"--field {shlex.quote(f'{role}={column}')}"
