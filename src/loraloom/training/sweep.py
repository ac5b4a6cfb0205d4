"""A sweep while it trains: Optuna chooses its jobs and says which of them to stop.

Its study, a journal beside the jobs, is the record of that, and several workers may share it. A
single process that goes on from a snapshot cuts it back, and decides again what came after.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pandas import DataFrame

from loraloom.atomic_io import cut_torn_line, write_output
from loraloom.errors import ConfigError
from loraloom.training.checkpoints import describe_changes
from loraloom.training.engine import Engine
from loraloom.training.job import Job, metric_mode
from loraloom.training.reporting import Progress
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import RunConfig
from loraloom.training.sweep_settings import format_drawn

_STATUS = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


def open_study(run: RunConfig, directory: RunDirectory, journal_bytes: int | None) -> optuna.Study:
    """Begin a run's study, or go on with the one there; None leaves it whole, as others use it."""
    assert run.sweep is not None
    journal = directory.sweep_journal
    if journal_bytes is not None:
        cut_torn_line(journal, journal_bytes)
        # A killed process leaves Optuna's lock, for which the next one would wait half a minute.
        Path(f"{journal}.lock").unlink(missing_ok=True)
    pruner = NopPruner()
    if run.sweep.early_stopping is not None:
        halving = run.sweep.early_stopping.asha
        pruner = SuccessiveHalvingPruner(halving.min_steps, halving.reduction_factor)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="sweep",
        direction="minimize" if metric_mode(run.sweep.metric) == "min" else "maximize",
        load_if_exists=True,
        pruner=pruner,
    )
    now = run.sweep.model_dump(mode="json", include={"metric", "parameters"})
    now["search"] = run.sweep.search_kind
    saved = now | study.user_attrs.get("sweep", {})  # older studies don't have all of it
    changes = describe_changes(saved, now, "sweep")
    if changes:
        raise ConfigError(
            f"--resume requires the sweep of the interrupted run: {'; '.join(changes)}; restore "
            "the sweep's settings, or pass --overwrite to start again"
        )
    study.set_user_attr("sweep", now)
    num_trials = len(study.get_trials(deepcopy=False))
    for combination in run.sweep.combinations()[num_trials:]:
        study.enqueue_trial(combination)
    return study


def rank_jobs(run: RunConfig, study: optuna.Study) -> list[dict[str, Any]]:
    """Rank the jobs that have begun: those at their end first, then those that got further."""
    sweep = run.sweep
    assert sweep is not None
    rows: list[dict[str, Any]] = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        steps = trial.last_step or 0
        value = trial.intermediate_values.get(steps) if trial.value is None else trial.value
        row = {"name": sweep.job_name(trial.number, trial.params), "rank": 0}
        row |= {"status": _STATUS[trial.state], "steps": steps}
        row |= {path: format_drawn(drawn) for path, drawn in trial.params.items()}
        rows.append(row | {sweep.metric: value})
    sign = 1 if metric_mode(sweep.metric) == "min" else -1

    def standing(row: dict[str, Any]) -> tuple[bool, float, float]:
        value = row[sweep.metric]
        further = -math.inf if row["status"] == "finished" else -row["steps"]
        return row["status"] == "failed", further, math.inf if value is None else sign * value

    rows.sort(key=standing)
    return [row | {"rank": rank} for rank, row in enumerate(rows, 1)]


def show_ranking(
    run: RunConfig, study: optuna.Study, directory: RunDirectory, progress: Progress
) -> None:
    table = DataFrame(rank_jobs(run, study))
    # Once more: of workers that wrote it at the same time, the last may have known less.
    write_output(directory.sweep_table, table.to_csv(index=False))
    progress.message(table.to_string(index=False, na_rep="-", float_format="{:.4f}".format))


@dataclass
class Sweep:
    """A sweep whose jobs an engine trains: all, or its share as worker `share[0]` of `share[1]`."""

    run: RunConfig
    engine: Engine
    progress: Progress
    journal_bytes: int | None
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        assert self.run.sweep is not None
        self._sweep = self.run.sweep
        self._directory = self.engine.directory
        self._study = open_study(self.run, self._directory, self.journal_bytes)
        self._lock = FileLock(self._directory.sweep_lock)
        self._written: list[dict[str, Any]] = []
        for job in self.engine.jobs.values():
            self._prepare(job)

    def between_steps(self, engine: Engine) -> None:
        for trial, name in self._share_of_trials():
            if trial.state == TrialState.RUNNING:
                self._report(trial, name)
        trials = self._share_of_trials()
        # Jobs of a fused step come to a rung together. Optuna judges each against those before it,
        # so in the order of a grid, where neighbours are alike, it would let too many go on.
        random.Random(engine.round).shuffle(trials)
        for trial, name in trials:
            self._judge(trial, name)
        self._fill()
        rows = rank_jobs(self.run, self._study)
        if rows != self._written:
            self._written = rows
            write_output(self._directory.sweep_table, DataFrame(rows).to_csv(index=False))

    def conclude(self) -> None:
        show_ranking(self.run, self._study, self._directory, self.progress)

    def _share_of_trials(self) -> list[tuple[FrozenTrial, str]]:
        number, _ = self.share
        trials = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.user_attrs.get("worker") == number:
                trials.append((trial, self._sweep.job_name(trial.number, trial.params)))
        return trials

    def _handle(self, trial: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self._study, trial._trial_id)

    def _prepare(self, job: Job) -> None:
        """Let a job be measured at its rungs."""
        stopping = self._sweep.early_stopping
        if stopping is not None:
            job.milestones = frozenset(stopping.asha.rungs(job.total_steps))

    def _report(self, trial: FrozenTrial, name: str) -> None:
        metric = self._sweep.metric
        result = self.engine.results.get(name)
        if result is not None:
            step = result.steps
            metrics = result.last_metrics
        elif name in self.engine.jobs:
            step = self.engine.jobs[name].position.evaluated_step
            metrics = self.engine.jobs[name].position.metrics
        else:
            return
        if metric in metrics and step not in trial.intermediate_values:
            self._handle(trial).report(metrics[metric], step)
        if result is None:
            return
        if result.status == "stopped":
            self._study.tell(trial.number, state=TrialState.PRUNED)
        elif result.status == "failed" or metric not in result.metrics:
            self._study.tell(trial.number, state=TrialState.FAIL)
        else:
            self._study.tell(trial.number, result.metrics[metric])

    def _judge(self, trial: FrozenTrial, name: str) -> None:
        job = self.engine.jobs.get(name)
        step = trial.last_step
        if job is None or step is None or not job.at_boundary or job.position.step != step:
            return
        # A worker that was lost after it stopped the job may go on from before that.
        is_pruned = trial.state == TrialState.PRUNED
        if trial.state == TrialState.RUNNING:
            is_pruned = self._handle(trial).should_prune()
        if is_pruned:
            value = f"{self._sweep.metric} {trial.intermediate_values[step]:.4f}"
            self.engine.stop(name, f"{value} is not among the best after step {step}")
            if trial.state == TrialState.RUNNING:
                self._report(trial, name)

    def _fill(self) -> None:
        """Let jobs join until as many train as may: first those that have begun already."""
        for trial, name in self._share_of_trials():
            if trial.state == TrialState.RUNNING and name not in self.engine.results:
                self._start(trial, name)
        max_jobs = self._sweep.share_of_concurrent(*self.share)
        while sum(name in self.engine.jobs for _, name in self._share_of_trials()) < max_jobs:
            with self._lock:  # of the workers, one looks, asks and signs at a time
                trial = self._take()
            if trial is None:
                return
            self._start(trial, self._sweep.job_name(trial.number, trial.params))

    def _take(self) -> FrozenTrial | None:
        trials = self._study.get_trials(deepcopy=False)
        unsigned = [trial for trial in trials if "worker" not in trial.user_attrs]
        if not unsigned and len(trials) >= self._sweep.num_jobs:
            return None
        # A worker that was killed before it signed leaves one, perhaps without all of its values.
        lost = next((trial for trial in unsigned if trial.state == TrialState.RUNNING), None)
        if self._sweep.search != "grid":
            # By number, so that a resumed run draws as an unbroken one.
            number = len(trials) if lost is None else lost.number
            seed = (self._sweep.search.seed + number) % 2**32
            self._study.sampler = optuna.samplers.TPESampler(seed=seed)
        if lost is None:
            taken = self._study.ask(self._sweep.distributions)
        else:
            taken = self._handle(lost)
            for path, distribution in self._sweep.distributions.items():
                taken._suggest(path, distribution)
        taken.set_user_attr("worker", self.share[0])
        return self._study.get_trials(deepcopy=False)[taken.number]

    def _start(self, trial: FrozenTrial, name: str) -> None:
        if name in self.engine.jobs:
            return
        if name in self.engine.results:
            return self._report(trial, name)
        try:
            job = self.engine.builder.build(
                self.run.trial(trial.number, trial.params), reread=False
            )
            self._prepare(job)
            self.engine.add(job, overwrite=True)
        except Exception as error:  # of memory, or of a library that makes initial weights
            self._study.tell(trial.number, state=TrialState.FAIL)
            self.progress.message(f"error: sweep: {name} cannot train: {error}")
