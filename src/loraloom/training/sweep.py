"""A sweep while it trains: Optuna chooses its jobs and says which of them to stop.

The study is Optuna's, in a journal file beside the jobs, and it is the record of what was decided.
Every combination that is known beforehand waits in it from the start; whoever trains takes the next
one, so several workers may share a study. A single process that goes on from a snapshot cuts the
journal back to it, and decides again what came after.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pandas import DataFrame
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from loraloom.durable import cut_torn_line, write_output
from loraloom.errors import ConfigError, LoraloomError, plain
from loraloom.terminal import make_table
from loraloom.training.engine import Engine
from loraloom.training.job import Job, metric_mode
from loraloom.training.progress import Progress
from loraloom.training.results import JobResult
from loraloom.training.settings import RunConfig
from loraloom.training.store import RunDirectory, describe_changes
from loraloom.training.sweep_settings import (
    SweepConfig,
    SweepStoppingConfig,
    format_drawn,
)

_log = logging.getLogger(__name__)

_STATUS = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
# A line of sweep.csv, by column.
Row = dict[str, Any]


class AshaPruner(BasePruner):
    """Successive halving over all jobs that have reached a rung so far.

    Optuna's own pruner judges jobs in the order in which they ask, and always lets the first go on.
    In a fused step many jobs come to a rung together, in the order of a grid, so here all of them
    report first, and then the best `1 / reduction_factor` go on, at least one.
    """

    def __init__(self, reduction_factor: int, rungs: set[int]):
        self._reduction_factor = reduction_factor
        self._rungs = rungs

    @override
    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None or step not in self._rungs:
            return False
        curves = [other.intermediate_values for other in study.get_trials(deepcopy=False)]
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        values = sorted(sign * curve[step] for curve in curves if step in curve)
        num_kept = max(1, len(values) // self._reduction_factor)
        return sign * trial.intermediate_values[step] > values[num_kept - 1]


def open_study(
    run: RunConfig, directory: RunDirectory, journal_bytes: int | None = None
) -> optuna.Study:
    """Begin a run's study, or go on with the one that is there, cut back to so many bytes.

    Where several processes share it, None leaves it whole.
    """
    assert run.sweep is not None
    journal = directory.sweep_journal
    if journal_bytes is not None:
        cut_torn_line(journal, journal_bytes)
        # A process that was killed leaves Optuna's lock, and the next one would wait half a minute
        # for it. The run's own lock says that nobody else is here.
        Path(f"{journal}.lock").unlink(missing_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="sweep",
        direction="minimize" if metric_mode(run.sweep.metric) == "min" else "maximize",
        load_if_exists=True,
        pruner=NopPruner(),
    )
    now = run.sweep.model_dump(mode="json", include={"metric", "parameters"})
    begun = study.user_attrs.get("sweep")
    if changes := [] if begun is None else describe_changes(begun, now, "sweep"):
        raise ConfigError(
            f"--resume needs the sweep that the run began with, these differ: "
            f"{'; '.join(changes)}; set them back, or give --overwrite to begin again"
        )
    study.set_user_attr("sweep", now)
    for combination in run.sweep.combinations()[len(study.get_trials(deepcopy=False)) :]:
        study.enqueue_trial(combination)
    return study


def rank_jobs(sweep: SweepConfig, study: optuna.Study) -> list[Row]:
    """Tell how the jobs stand that have begun, the best first.

    Those at their end are ahead, then those that got further; by the metric among them.
    """
    rows, order = list[Row](), list[tuple[Any, ...]]()
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        curve, steps, seconds = trial.intermediate_values, trial.last_step or 0, trial.duration
        value = curve.get(steps) if trial.value is None else trial.value
        is_finished = trial.state == TrialState.COMPLETE
        further = (not is_finished, 0 if is_finished else -steps)
        order.append((trial.state == TrialState.FAIL, *further, sign * (value or 0.0), len(rows)))
        combination = parameters_of(trial)
        drawn = {path: format_drawn(value) for path, value in combination.items()}
        rows.append(
            {
                **{"name": sweep.job_name(trial.number, combination), "rank": 0},
                **{"status": _STATUS[trial.state], "steps": steps, **drawn, sweep.metric: value},
                "seconds": None if seconds is None else round(seconds.total_seconds(), 1),
            }
        )
    ranked = [rows[place] for *_, place in sorted(order)]
    return [row | {"rank": rank} for rank, row in enumerate(ranked, start=1)]


def make_ranking(sweep: SweepConfig, study: optuna.Study) -> Table:
    """The jobs of a sweep for people, the best first."""
    rows = rank_jobs(sweep, study)
    columns = ["rank", "name", *sweep.parameters, sweep.metric, "steps", "status"]
    table = make_table(*columns[:2], values=[Text(column) for column in columns[2:]])
    for row in rows:
        values = [row.get(column) for column in columns]
        texts = [f"{one:.4f}" if isinstance(one, float) else str(one) for one in values]
        # As Text: a template among the parameters may look like rich's markup.
        table.add_row(*(Text(plain(text)) for text in texts))
    return table


class Sweep:
    """A sweep whose jobs an engine trains: all of them, or those that one of several workers takes.

    Args:
        place: The number of the worker, and how many there are.
    """

    def __init__(
        self,
        run: RunConfig,
        study: optuna.Study,
        directory: RunDirectory,
        progress: Progress,
        engine: Engine,
        place: tuple[int, int] = (0, 1),
    ):
        assert run.sweep is not None
        self.sweep = run.sweep
        self.study = study
        self._metric = run.sweep.metric
        self._run = run
        self._directory = directory
        self._progress = progress
        self._engine = engine
        self._place = place
        self._longest = 1
        self._written: list[Row] = []
        for job in engine.jobs.values():
            if self.sweep.owns(job.name):
                self._prepare(job)

    def between_steps(self, engine: Engine) -> None:
        """Report what was measured, stop the jobs that lost, and let others join."""
        for trial, name in self._own():
            if trial.state == TrialState.RUNNING:
                self._report(trial, name)
        # All report before any is judged: jobs of a fused step come to a rung together.
        for trial, name in self._own():
            self._judge(trial, name)
        self._fill()
        rows = rank_jobs(self.sweep, self.study)
        if rows != self._written:
            self._written = rows
            write_output(self._directory.sweep_table, DataFrame(rows).to_csv(index=False))

    def conclude(self) -> None:
        """Print how the jobs stand in the end."""
        self._progress.conclude(make_ranking(self.sweep, self.study))

    def _own(self) -> list[tuple[FrozenTrial, str]]:
        """Return the trials that this worker has begun, with the names of their jobs."""
        number, size = self._place
        own = list[tuple[FrozenTrial, str]]()
        for trial in self.study.get_trials(deepcopy=False):
            worker = trial.user_attrs.get("worker")  # none yet if another one asks at this moment
            if trial.state == TrialState.WAITING or (worker is None and size > 1):
                continue
            if (worker or 0) % size == number:
                own.append((trial, self.sweep.job_name(trial.number, parameters_of(trial))))
        return own

    def _handle(self, trial: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self.study, trial._trial_id)

    def _prepare(self, job: Job) -> None:
        """Let a job be measured at its rungs, and brackets go up to the longest of the jobs."""
        self._longest = max(self._longest, job.total_steps)
        if (stopping := self.sweep.early_stopping) is not None:
            job.milestones = frozenset(stopping.rungs(job.total_steps))
            self.study.pruner = _pruner(stopping, self._longest)

    def _report(self, trial: FrozenTrial, name: str) -> None:
        """Report the last evaluation of a job that has begun, or tell what became of it."""
        job, result = self._engine.jobs.get(name), self._engine.results.get(name)
        if result is not None:
            step, metrics = result.steps, result.last_metrics
        elif job is not None:
            step, metrics = job.position.evaluated_step, job.position.metrics
        else:
            return
        if self._metric in metrics and step not in trial.intermediate_values:
            self._handle(trial).report(metrics[self._metric], step)
        if result is not None:
            self._tell(trial, result)

    def _tell(self, trial: FrozenTrial, result: JobResult) -> None:
        value = result.metrics.get(self._metric)
        if result.status == "stopped":
            self.study.tell(trial.number, state=TrialState.PRUNED)
        elif result.status == "failed" or value is None:
            self.study.tell(trial.number, state=TrialState.FAIL)
        else:
            self.study.tell(trial.number, value)

    def _judge(self, trial: FrozenTrial, name: str) -> None:
        """Stop a job that lost, at the step where that was decided."""
        job, step = self._engine.jobs.get(name), trial.last_step
        if job is None or step is None or (job.position.step, job.at_boundary) != (step, True):
            return
        is_lost = trial.state == TrialState.PRUNED  # after the job's snapshot, so it came again
        if is_lost or (trial.state == TrialState.RUNNING and self._handle(trial).should_prune()):
            value = f"{self._metric} {trial.intermediate_values[step]:.4f}"
            result = self._engine.stop(name, f"{value} is not among the best after step {step}")
            if not is_lost:
                self._tell(trial, result)

    def _fill(self) -> None:
        """Let jobs join until as many train as may: first those that have begun already."""
        for trial, name in self._own():
            is_known = name in self._engine.jobs or name in self._engine.results
            if trial.state == TrialState.RUNNING and not is_known:
                self._start(trial, name)
        most = -(-self.sweep.num_concurrent // self._place[1])
        while sum(name in self._engine.jobs for _, name in self._own()) < most:
            trials = self.study.get_trials(deepcopy=False)
            is_waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if not is_waiting and len(trials) >= self.sweep.num_jobs:
                return
            if self.sweep.search != "grid":
                # By number, so that a resumed run draws as an unbroken one.
                self.study.sampler = TPESampler(seed=self.sweep.search.seed + len(trials))
            taken = self.study.ask(self.sweep.distributions)
            taken.set_user_attr("worker", self._place[0])
            trial = self.study.get_trials(deepcopy=False)[taken.number]
            self._start(trial, self.sweep.job_name(trial.number, parameters_of(trial)))

    def _start(self, trial: FrozenTrial, name: str) -> None:
        """Let a job join that does not train yet, unless it can't."""
        if name in self._engine.jobs:
            return
        if name in self._engine.results or self._engine.recall(name):
            return self._report(trial, name)
        try:
            job = self._engine.builder.build(self._run.trial(trial.number, parameters_of(trial)))
            self._prepare(job)
            self._engine.add(job, overwrite=True)
        except Exception as error:  # of memory, or of a library that makes initial weights
            if not isinstance(error, LoraloomError | OSError):
                _log.error("%s can't be built", name, exc_info=error)
            self.study.tell(trial.number, state=TrialState.FAIL)
            self._progress.message(f"error: sweep: {name} can't train: {error}")


def parameters_of(trial: FrozenTrial) -> Mapping[str, Any]:
    """Return a trial's parameters, also of one that was taken a moment ago."""
    return trial.system_attrs.get("fixed_params", trial.params)


def _pruner(stopping: SweepStoppingConfig, longest: int) -> BasePruner:
    if (rule := stopping.hyperband) is not None:
        return HyperbandPruner(rule.min_steps, max(longest, rule.min_steps), rule.reduction_factor)
    if (rule := stopping.median) is not None:
        return MedianPruner(rule.min_jobs, rule.min_steps)
    if (rule := stopping.asha) is not None:
        return AshaPruner(rule.reduction_factor, stopping.rungs(longest))
    return NopPruner()
