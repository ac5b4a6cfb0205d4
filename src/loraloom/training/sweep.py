"""A sweep while it trains: Optuna chooses its jobs and says which of them to stop.

The study is Optuna's, in a journal file beside the jobs, and it is the record of what was decided.
Every combination that is known beforehand waits in it from the start; whoever trains takes the next
one, so several workers may share a study. A single process that goes on from a snapshot cuts the
journal back to it, and decides again what came after.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from loraloom.durable import cut_torn_line, write_output
from loraloom.errors import ConfigError, LoraloomError
from loraloom.eval.sweep_plot import plot_sweep
from loraloom.training.job import Job, metric_mode
from loraloom.training.parallel import Lead
from loraloom.training.progress import Progress
from loraloom.training.ranking import RUNNING, Ranking, Standing, ranking_csv
from loraloom.training.results import JobResult
from loraloom.training.settings import RunConfig
from loraloom.training.store import RunDirectory, describe_changes
from loraloom.training.sweep_settings import SweepStoppingConfig, TpeSearch, parameter_value

_log = logging.getLogger(__name__)

_TPE_TRIES = 20
"""Draws of TPE among which one is looked for that was not tried."""
_STATUS = {
    TrialState.RUNNING: RUNNING,
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


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

    @override
    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
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


class _NoLock(JournalFileOpenLock):
    """For a single process, which locks the run's directory.

    Optuna's would stay where a process is killed, and make the next one wait for half a minute.
    """

    @override
    def acquire(self) -> bool:
        return True

    @override
    def release(self) -> None:
        pass


class SweepStudy:
    """A sweep as Optuna stores it, and its ranking for people.

    Args:
        run: With a sweep.
        directory: Of the run's results.
        progress: Shows the ranking.
    """

    def __init__(self, run: RunConfig, directory: RunDirectory, progress: Progress):
        assert run.sweep is not None
        self.sweep = run.sweep
        self.metric = run.sweep.metric
        self.stopping = run.sweep.early_stopping
        self.longest = max((trial.job.train.max_steps or 0 for trial in run.trials), default=0)
        self._planned = run.sweep.combinations()
        self._directory = directory
        self._progress = progress
        self._written: list[tuple[Any, ...]] = []
        self._fault = ""

    def open(self, journal_bytes: int | None = None) -> None:
        """Begin a study, or go on with the one that is there.

        Args:
            journal_bytes: What the journal is cut to; None where several processes share it.
        """
        journal = self._directory.sweep_journal
        try:
            lock = None
            if journal_bytes is not None:
                cut_torn_line(journal, journal_bytes)
                lock = _NoLock(str(journal))
            backend = JournalFileBackend(str(journal), lock)
            self.study = optuna.create_study(
                storage=JournalStorage(backend),
                study_name="sweep",
                direction="minimize" if metric_mode(self.metric) == "min" else "maximize",
                load_if_exists=True,
            )
            now = self.sweep.model_dump(mode="json", include={"metric", "parameters"})
            begun = self.study.user_attrs.get("sweep", now)
            self.study.set_user_attr("sweep", begun)
            self.note_length(self.study.user_attrs.get("longest_job", self.longest))
            for combination in self._planned[len(self.all_trials()) :]:
                self.study.enqueue_trial(combination)
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

    def note_length(self, total_steps: int) -> None:
        """Let the rungs go up to the longest of the sweep's jobs."""
        self.longest = max(self.longest, total_steps)
        if self.longest > self.study.user_attrs.get("longest_job", -1):
            self.study.set_user_attr("longest_job", self.longest)
        self.study.pruner = _pruner(self.stopping, self.longest)

    def all_trials(self) -> list[FrozenTrial]:
        """Return all trials, those that wait for their turn included."""
        return self.study.get_trials(deepcopy=False)

    def begun(self) -> list[tuple[FrozenTrial, str]]:
        """Return the trials that have begun, with the names of their jobs."""
        begun = [trial for trial in self.all_trials() if trial.state != TrialState.WAITING]
        return [(trial, self.sweep.job_name(trial.number, parameters_of(trial))) for trial in begun]

    def give_up(self, trial: FrozenTrial) -> None:
        """Note that a job which has begun can't be trained."""
        self.study.tell(trial.number, state=TrialState.FAIL)

    def ranking(self) -> Ranking:
        """Tell how the jobs stand that have begun."""
        rungs = () if self.stopping is None else self.stopping.rungs(self.longest)
        standings = []
        for trial, name in self.begun():
            ended, curve = trial.user_attrs.get("ended", {}), trial.intermediate_values
            if trial.state == TrialState.FAIL and not ended:  # it could not be built
                continue
            running_s = 0.0
            if trial.state == TrialState.RUNNING and trial.datetime_start is not None:
                running_s = (datetime.now() - trial.datetime_start).total_seconds()
            standings.append(
                Standing(
                    name,
                    {path: parameter_value(v) for path, v in parameters_of(trial).items()},
                    ended.get("status", _STATUS[trial.state]),
                    ended.get("steps", trial.last_step or 0),
                    None if trial.state.is_finished() else trial.user_attrs.get("total_steps"),
                    {rung: curve[rung] for rung in rungs if rung in curve},
                    ended.get("value", curve[max(curve)] if curve else None),
                    ended.get("seconds", running_s),
                )
            )
        return Ranking(self.metric, rungs, tuple(standings), self.sweep.num_jobs)

    def show(self, *, is_over: bool = False) -> None:
        """Show the ranking, and write table and picture where something was measured or ended."""
        with self.noting_faults():
            ranking = self.ranking()
            if not ranking.standings:
                return
            self._progress.rank(ranking)
            if ranking.measured != self._written:
                write_output(self._directory.sweep_table, ranking_csv(ranking))
                self._written = ranking.measured
                if not any(one.is_running for one in ranking.standings):
                    names = [name for _, name in self.begun()]
                    plot_sweep(self.study, names, self.metric, self._directory.sweep_picture)
            if is_over:
                self._progress.conclude(ranking)

    @contextmanager
    def noting_faults(self) -> Iterator[None]:
        """Let files that can't be written, on a full disk for example, not end the training."""
        try:
            yield
        except (ConfigError, OSError, ValueError) as error:  # ValueError: a journal that was edited
            if str(error) != self._fault:
                self._progress.message(f"warning: sweep: {error}")
            self._fault = str(error)


class Sweep:
    """A study whose jobs an engine trains: all of them, or those that one of several workers takes.

    Args:
        study: Not open yet.
        run: With a sweep.
        engine: That the jobs join.
        progress: Told of jobs that can't train.
        jobs: Those of the run that are not done; others than the sweep's are left alone.
        worker: Number of the worker, and how many there are.

    Raises:
        ConfigError: If no job is long enough to be stopped.
    """

    def __init__(
        self,
        study: SweepStudy,
        run: RunConfig,
        engine: Lead,
        progress: Progress,
        jobs: Sequence[Job] = (),
        worker: tuple[int, int] = (0, 1),
    ):
        self.study = study
        self._run = run
        self._sweep = study.sweep
        self._engine = engine
        self._progress = progress
        self._worker, self._num_workers = worker
        own = [job for job in jobs if self._sweep.owns(job.name)]
        study.longest = max([study.longest, *(job.total_steps for job in own)])
        for difference in _differences(own, study.metric):
            progress.message(f"warning: sweep: {study.metric} compares jobs roughly: {difference}")
        for job in own:
            self._set_rungs(job)

    def check_reached(self) -> None:
        """Check that the longest job is long enough to be stopped."""
        if self.study.stopping is not None:
            try:
                self.study.stopping.check_reached(self.study.longest)
            except ConfigError as error:
                raise ConfigError(f"sweep.{error}") from None

    def between_steps(self, engine: Lead) -> None:
        """Report what was measured, stop the jobs that lost, and let others join."""
        with self.study.noting_faults():
            for trial, name in self._own():
                if trial.state == TrialState.RUNNING:
                    self._report(trial, name)
            self._judge()
            self._fill()
        if self._num_workers == 1:
            self.study.show()

    def _own(self) -> list[tuple[FrozenTrial, str]]:
        return [
            (trial, name)
            for trial, name in self.study.begun()
            if trial.user_attrs.get("worker", 0) % self._num_workers == self._worker
        ]

    def _handle(self, trial: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self.study.study, trial._trial_id)

    def _report(self, trial: FrozenTrial, name: str) -> None:
        """Report the last evaluation of a job that has begun, or tell what became of it."""
        job, result = self._engine.jobs.get(name), self._engine.results.get(name)
        if result is not None:
            step, metrics = result.steps, result.last_metrics
        elif job is not None:
            step, metrics = job.position.evaluated_step, job.position.metrics
        else:
            return
        if self.study.metric in metrics and step not in trial.intermediate_values:
            self._handle(trial).report(metrics[self.study.metric], step)
        if result is not None:
            self._tell(trial, result)

    def _tell(self, trial: FrozenTrial, result: JobResult) -> None:
        value, study = result.metrics.get(self.study.metric), self.study.study
        ended = {"status": result.status, "steps": result.steps, "seconds": result.seconds}
        self._handle(trial).set_user_attr("ended", {**ended, "value": value})
        if result.status == "stopped":
            study.tell(trial.number, state=TrialState.PRUNED)
        elif result.status == "failed" or value is None:
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study.tell(trial.number, value)

    def _judge(self) -> None:
        """Stop the jobs that lost, each at the step where that was decided."""
        for trial, name in self._own():
            job, step = self._engine.jobs.get(name), trial.last_step
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
            value = f"{self.study.metric} {trial.intermediate_values[step]:.4f}"
            reason = f"{value} is not among the best after step {step}"
            result = self._engine.stop(name, reason)
            if not is_lost:
                self._tell(trial, result)

    def _fill(self) -> None:
        """Let jobs join until as many train as may: first those that have begun already."""
        for trial, name in self._own():
            has_ended = name in self._engine.results
            if (
                trial.state == TrialState.RUNNING
                and name not in self._engine.jobs
                and not has_ended
            ):
                self._start(trial, name)
        most = -(-self._sweep.num_concurrent // self._num_workers)
        while sum(name in self._engine.jobs for _, name in self._own()) < most:
            trial = self._next()
            if trial is None:
                return
            self._start(trial, self._sweep.job_name(trial.number, parameters_of(trial)))

    def _next(self) -> FrozenTrial | None:
        """Take the next trial; None if there are enough."""
        trials = self.study.all_trials()
        if all(trial.state != TrialState.WAITING for trial in trials):
            if len(trials) >= self._sweep.num_jobs:
                return None
            self.study.study.enqueue_trial(self._suggest(trials))
        taken = self.study.study.ask(self._sweep.distributions)
        taken.set_user_attr("worker", self._worker)
        return self.study.all_trials()[taken.number]

    def _suggest(self, trials: list[FrozenTrial]) -> dict[str, Any]:
        """Ask TPE for a combination; if one that was tried comes again and again, it is taken.

        The draw follows from seed, number and study, so a resumed run makes it as an unbroken one.
        """
        search = self._sweep.search
        assert isinstance(search, TpeSearch)
        seed = random.Random(f"{search.seed} {len(trials)}").getrandbits(32)
        study = optuna.create_study(
            direction=self.study.study.direction, sampler=TPESampler(seed=seed)
        )  # in memory: draws that are not taken leave no trace
        study.add_trials(trials)
        suggested = [study.ask(self._sweep.distributions).params for _ in range(_TPE_TRIES)]
        tried = [parameters_of(trial) for trial in trials]
        return next((params for params in suggested if params not in tried), suggested[0])

    def _start(self, trial: FrozenTrial, name: str) -> None:
        """Let a job join that does not train yet, unless it can't."""
        job = self._engine.jobs.get(name)
        if job is not None:
            self._handle(trial).set_user_attr("total_steps", job.total_steps)
            return
        if name in self._engine.results or self._engine.recall(name):
            return self._report(trial, name)
        try:
            job = self._engine.build(self._run.trial(trial.number, parameters_of(trial)).job)
            self._set_rungs(job)
            self.study.note_length(job.total_steps)
            self._handle(trial).set_user_attr("total_steps", job.total_steps)
            self._engine.add(job, overwrite=True)
        except Exception as error:  # of memory, or of a library that makes initial weights
            if not isinstance(error, LoraloomError | OSError):
                _log.error("%s can't be built", name, exc_info=error)
            self.study.study.tell(trial.number, state=TrialState.FAIL)
            self._progress.message(f"error: sweep: {name} can't train: {error}")

    def _set_rungs(self, job: Job) -> None:
        """Have a job evaluated at its rungs."""
        if self.study.stopping is not None:
            job.milestones = frozenset(self.study.stopping.rungs(job.total_steps))


def parameters_of(trial: FrozenTrial) -> Mapping[str, Any]:
    """Return a trial's parameters, also of one that was taken a moment ago, or waits."""
    return trial.system_attrs.get("fixed_params", trial.params)


def _pruner(stopping: SweepStoppingConfig | None, longest: int) -> BasePruner:
    """What stops jobs, the longest of which has so many steps."""
    if stopping is None:
        return NopPruner()
    if stopping.hyperband is not None:
        hyperband = stopping.hyperband
        most = max(longest, hyperband.min_steps)
        return HyperbandPruner(hyperband.min_steps, most, hyperband.reduction_factor)
    if stopping.median is not None:
        return MedianPruner(stopping.median.min_jobs, stopping.median.min_steps)
    return AshaPruner(stopping)


def _differences(jobs: Sequence[Job], metric: str) -> list[str]:
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
