"""A sweep while it trains: Optuna chooses its jobs and says which of them to stop.

The study is Optuna's, in a journal file beside the jobs, and it is the record of what was decided.
A run that goes on from a snapshot forgets what the journal got after it, and decides it again.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from loraloom.config.job import JobConfig
from loraloom.config.run import RunConfig
from loraloom.config.sweep import SweepStoppingConfig, TpeSearch, parameter_value
from loraloom.durable import cut_torn_line, write_output
from loraloom.errors import ConfigError, LoraloomError
from loraloom.eval.sweep_plot import plot_sweep
from loraloom.training.run.checkpoint import describe_changes
from loraloom.training.run.job import JobView
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import Progress
from loraloom.training.run.ranking import RUNNING, Ranking, Standing, ranking_csv
from loraloom.training.run.results import JobResult
from loraloom.training.run.selection import metric_mode

_log = logging.getLogger(__name__)

_ROUND = "round"
_TPE_TRIES = 20
"""Draws of TPE among which one is looked for that was not tried."""


AnyJob = TypeVar("AnyJob", bound=JobView)


@runtime_checkable
class Trainer(Protocol[AnyJob]):
    """What trains the jobs of a sweep: an engine, or a cluster of them."""

    @property
    def jobs(self) -> Mapping[str, AnyJob]:
        """Those that train or wait for room, by name."""
        ...

    @property
    def results(self) -> Mapping[str, JobResult]:
        """What became of the others."""
        ...

    @property
    def round(self) -> int:
        """Rounds done."""
        ...

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        ...

    def add(self, job: AnyJob, *, overwrite: bool = False) -> None:
        """Let a job join."""

    def stop(self, name: str, reason: str) -> JobResult:
        """End a job now."""
        ...


class AshaPruner(BasePruner):
    """Successive halving over all jobs that have reached a rung so far.

    Optuna's own pruner judges jobs in the order in which they ask, and always lets the first go on.
    In a fused step many jobs come to a rung together, so here all of them report first, and then
    the best `1 / reduction_factor` go on, at least one; of equal ones the first in the sweep.
    """

    def __init__(self, stopping: SweepStoppingConfig):
        assert stopping.asha is not None
        self._stopping = stopping
        self._reduction_factor = stopping.asha.reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether a job is not among the best at the rung where it stands."""
        step = trial.last_step
        if step is None or step not in self._stopping.rungs(step + 1):
            return False
        rivals = [
            one for one in study.get_trials(deepcopy=False) if step in one.intermediate_values
        ]
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        rivals.sort(key=lambda one: sign * one.intermediate_values[step])
        kept = rivals[: max(1, len(rivals) // self._reduction_factor)]
        return trial.number not in {one.number for one in kept}


class _Journal(JournalFileBackend):
    """A journal that has each entry whole, and none that could not be written and synced.

    Nobody else writes it, as a run locks its directory, so it needs no lock of its own: Optuna's
    would stay where a process is killed, and make the next one wait for half a minute.
    """

    def __init__(self, path: Path):
        super().__init__(str(path), _NoLock(str(path)))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries, or nothing; at a fault once more, as a decision can't wait for long."""
        cut_torn_line(self._path)
        length = self._path.stat().st_size
        try:
            super().append_logs(logs)
        except OSError:
            os.truncate(self._path, length)
            super().append_logs(logs)


class _NoLock(JournalFileOpenLock):
    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Sweep(Generic[AnyJob]):
    """The jobs of a sweep."""

    def __init__(
        self,
        run: RunConfig,
        directory: RunDirectory,
        progress: Progress,
        build: Callable[[JobConfig], AnyJob],
        jobs: Iterable[AnyJob],
        *,
        is_new: bool = True,
    ):
        assert run.sweep is not None
        self._run = run
        self._sweep = run.sweep
        self._metric = run.sweep.metric
        self._stopping = run.sweep.early_stopping
        self._directory = directory
        self._progress = progress
        self._build = build
        self._planned = run.sweep.combinations()
        self._distributions = run.sweep.distributions
        self._written: list[tuple[Any, ...]] = []
        self._fault = ""
        own = [job for job in jobs if run.sweep.owns(job.name)]
        known = (trial.job.train.max_steps or 0 for trial in run.trials)  # of later jobs too
        self._longest = max([*(job.total_steps for job in own), *known], default=0)
        for difference in _differences(own, self._metric):
            progress.message(f"warning: sweep: {self._metric} compares jobs roughly: {difference}")
        if self._stopping is not None and is_new:
            try:
                self._stopping.check_reached(self._longest)
            except ConfigError as error:
                raise ConfigError(f"sweep.{error}") from None
        for job in own:
            self.set_rungs(job)

    def open(self, journal_bytes: int) -> None:
        """Begin a study, or go on with the one whose journal had so many bytes."""
        journal = self._directory.sweep_journal
        try:
            cut_torn_line(journal, journal_bytes)
            self._study = optuna.create_study(
                storage=JournalStorage(_Journal(journal)),
                study_name="sweep",
                direction="minimize" if metric_mode(self._metric) == "min" else "maximize",
                load_if_exists=True,
            )
            self._longest = self._study.user_attrs.get("longest_job", self._longest)
            self._study.set_user_attr("longest_job", self._longest)
            now = self._sweep.model_dump(mode="json", include={"metric", "parameters"})
            begun = self._study.user_attrs.get("sweep", now)
            self._study.set_user_attr("sweep", begun)
        except Exception as error:  # Optuna raises whatever comes of an entry that was edited
            raise ConfigError(
                f"{journal} can't be used: {type(error).__name__}: {error}; if it is damaged, "
                "delete it: what it decided is decided again"
            ) from error
        changes = describe_changes(begun, now, "sweep")
        if changes:
            raise ConfigError(
                f"--resume needs the sweep that the run began with, these differ: "
                f"{'; '.join(changes)}; set them back, or give --overwrite to begin again"
            )
        self._study.pruner = _pruner(self._stopping, self._longest)

    def between_steps(self, engine: Trainer[AnyJob]) -> None:
        """Report what was measured, stop the jobs that lost, let others join, show the ranking."""
        with self._noting_faults():
            self._report(engine)
            self._judge(engine)
            self._fill(engine)
            self._show(self.ranking(engine))

    def finish(self, engine: Trainer[AnyJob]) -> None:
        """Show the ranking a last time."""
        with self._noting_faults():
            ranking = self.ranking(engine)
            if ranking.standings:
                self._show(ranking)
                self._progress.conclude(ranking)

    def ranking(self, engine: Trainer[AnyJob]) -> Ranking:
        """Tell how the jobs stand that have begun."""
        rungs = () if self._stopping is None else self._stopping.rungs(self._longest)
        standings = []
        for trial, name in self._trials():
            parameters = {path: parameter_value(drawn) for path, drawn in trial.params.items()}
            curve = trial.intermediate_values
            values = {rung: curve[rung] for rung in rungs if rung in curve}
            if (result := engine.results.get(name)) is not None:
                value, seconds = result.metrics.get(self._metric), result.seconds
                state = (result.status, result.steps, None, values, value, seconds)
            elif (job := engine.jobs.get(name)) is not None:
                value, step = curve[max(curve)] if curve else None, job.position.step
                state = (RUNNING, step, job.total_steps, values, value, engine.seconds)
            else:
                continue
            standings.append(Standing(name, parameters, *state))
        return Ranking(self._metric, rungs, tuple(standings), self._sweep.num_jobs)

    @property
    def decides(self) -> bool:
        """Whether what becomes of jobs, or which ones come, depends on what others measure."""
        return self._stopping is not None or isinstance(self._sweep.search, TpeSearch)

    def owns(self, name: str) -> bool:
        """Whether a job of that name is one of the sweep's."""
        return self._sweep.owns(name)

    def begun(self) -> list[tuple[JobConfig, int, bool]]:
        """The jobs that have begun and did not fail.

        With them come the round in which each began, and whether the study knows its end.
        """
        trials = self._study.get_trials(deepcopy=False)
        return [
            (
                self._run.trial(one.number, one.params).job,
                one.user_attrs.get(_ROUND, 0),
                one.state.is_finished(),
            )
            for one in trials
            if one.state != TrialState.FAIL
        ]

    def _trials(self) -> list[tuple[FrozenTrial, str]]:
        """Optuna's trials with the names of their jobs."""
        trials = self._study.get_trials(deepcopy=False)
        return [(trial, self._sweep.job_name(trial.number, trial.params)) for trial in trials]

    def _handle(self, trial: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self._study, trial._trial_id)

    def _report(self, engine: Trainer[AnyJob]) -> None:
        """Report the last evaluation of each job, and tell what became of those that ended."""
        for trial, name in self._trials():
            job, result = engine.jobs.get(name), engine.results.get(name)
            if trial.state != TrialState.RUNNING:
                continue
            if result is not None:
                step, metrics = result.steps, result.last_metrics
            elif job is not None:
                step, metrics = job.position.evaluated_step, job.position.metrics
            else:
                continue
            if self._metric in metrics and step not in trial.intermediate_values:
                self._handle(trial).report(metrics[self._metric], step)
            if result is not None:
                self._tell(trial, result)

    def _tell(self, trial: FrozenTrial, result: JobResult) -> None:
        value = result.metrics.get(self._metric)
        if result.status == "stopped":
            self._study.tell(trial.number, state=TrialState.PRUNED)
        elif result.status == "failed" or value is None:
            self._study.tell(trial.number, state=TrialState.FAIL)
        else:
            self._study.tell(trial.number, value)

    def _judge(self, engine: Trainer[AnyJob]) -> None:
        """Stop the jobs that lost, each at the step where that was decided."""
        for trial, name in self._trials():
            job, step = engine.jobs.get(name), trial.last_step
            if job is None or step is None or (job.position.step, job.at_boundary) != (step, True):
                continue
            is_lost = trial.state == TrialState.PRUNED  # with its files, so that it came again
            if not is_lost and (
                trial.state != TrialState.RUNNING or trial.user_attrs.get("judged") == step
            ):
                continue
            if not (is_lost or self._handle(trial).should_prune()):
                self._handle(trial).set_user_attr("judged", step)
                continue
            value = f"{self._metric} {trial.intermediate_values[step]:.4f}"
            reason = f"{value} is not among the best after step {step}"
            result = engine.stop(name, reason)
            if not is_lost:
                self._tell(trial, result)

    def _fill(self, engine: Trainer[AnyJob]) -> None:
        """Let jobs join until as many train as may."""
        num_running = sum(name in engine.jobs for _, name in self._trials())
        while num_running < self._sweep.num_concurrent:
            trial = self._next(engine.round)
            if trial is None:
                return
            num_running += self._start(engine, trial)

    def _next(self, now: int) -> FrozenTrial | None:
        """The next trial, put down in the study with its round; None if there are enough."""
        number = len(self._study.get_trials(deepcopy=False))
        if number >= self._sweep.num_jobs:
            return None
        params = self._planned[number] if number < len(self._planned) else self._suggest(number)
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=self._distributions,
                user_attrs={_ROUND: now},
            )
        )
        return self._study.get_trials(deepcopy=False)[number]

    def _suggest(self, number: int) -> dict[str, Any]:
        """Ask TPE for a combination; if one that was tried comes again and again, it is taken.

        The draw follows from seed, number and study, so a resumed run makes it as an unbroken one.
        """
        search, trials = self._sweep.search, self._study.get_trials(deepcopy=False)
        assert isinstance(search, TpeSearch)
        seed = random.Random(f"{search.seed} {number}").getrandbits(32)
        study = optuna.create_study(
            direction=self._study.direction, sampler=TPESampler(seed=seed)
        )  # in memory: the journal gets a trial in one piece
        study.add_trials(trials)
        suggested = [study.ask(self._distributions).params for _ in range(_TPE_TRIES)]
        tried = [trial.params for trial in trials]
        return next((params for params in suggested if params not in tried), suggested[0])

    def _start(self, engine: Trainer[AnyJob], trial: FrozenTrial) -> bool:
        """Let a job join that does not train yet, unless it can't."""
        name = self._sweep.job_name(trial.number, trial.params)
        if name in engine.jobs or name in engine.results:
            return name in engine.jobs
        try:
            job = self._build(self._run.trial(trial.number, trial.params).job)
            self.set_rungs(job)
            engine.add(job, overwrite=True)
        except Exception as error:  # of memory, or of a library that makes initial weights
            if not isinstance(error, LoraloomError | OSError):
                _log.error("%s can't be built", name, exc_info=error)
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._progress.message(f"error: sweep: {name} can't train: {error}")
            return False
        return True

    def set_rungs(self, job: AnyJob) -> None:
        """Have a job evaluated at its rungs."""
        if self._stopping is not None:
            job.milestones = frozenset(self._stopping.rungs(job.total_steps))

    def _show(self, ranking: Ranking) -> None:
        self._progress.rank(ranking)
        if ranking.measured == self._written:
            return
        write_output(self._directory.sweep_table, ranking_csv(ranking))
        self._written = ranking.measured
        if not any(one.is_running for one in ranking.standings):
            names = [name for _, name in self._trials()]
            plot_sweep(self._study, names, self._metric, self._directory.sweep_picture)

    @contextmanager
    def _noting_faults(self) -> Iterator[None]:
        """Let files that can't be written, on a full disk for example, not end the training."""
        try:
            yield
        except (ConfigError, OSError, ValueError) as error:  # ValueError: a journal that was edited
            if str(error) != self._fault:
                self._progress.message(f"warning: sweep: {error}")
            self._fault = str(error)


def _pruner(stopping: SweepStoppingConfig | None, longest: int) -> BasePruner:
    """What stops jobs, the longest of which has so many steps."""
    if stopping is None:
        return NopPruner()
    if stopping.hyperband is not None:
        hyperband = stopping.hyperband
        return HyperbandPruner(hyperband.min_steps, longest, hyperband.reduction_factor)
    if stopping.median is not None:
        return MedianPruner(stopping.median.min_jobs, stopping.median.min_steps)
    return AshaPruner(stopping)


def _differences(jobs: Sequence[JobView], metric: str) -> list[str]:
    """Say why a metric of held-out rows does not measure jobs alike, if it doesn't."""
    if metric in {one.metric for job in jobs for one in job.config.eval}:
        return []
    found = []
    if len({job.held_out for job in jobs}) > 1:
        found.append(
            "they hold out other rows, as seed, data or max_length differ; give data.validation"
        )
    objectives = {job.config.train.objective.model_dump_json() for job in jobs}
    if metric_mode(metric) == "min" and len(objectives) > 1:
        found.append("their objectives differ; take metric: eval/rewards/accuracies")
    return found
