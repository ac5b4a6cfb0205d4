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
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.importance import get_param_importances
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from pandas import DataFrame
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from loraloom.durable import cut_torn_line, write_output
from loraloom.errors import ConfigError, LoraloomError, plain
from loraloom.eval.plots import save_figure
from loraloom.terminal import make_table
from loraloom.training.engine import Engine
from loraloom.training.job import Job, metric_mode
from loraloom.training.progress import Progress
from loraloom.training.results import JobResult
from loraloom.training.settings import RunConfig
from loraloom.training.store import RunDirectory, describe_changes
from loraloom.training.sweep_settings import (
    SweepStoppingConfig,
    TpeSearch,
    format_value,
    parameter_value,
)

_log = logging.getLogger(__name__)

# Draws of TPE among which one is looked for that was not tried.
_TPE_TRIES = 20
# Jobs that the picture's legend names, the best that were trained to their end.
_MAX_NAMES = 5
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
    In a fused step many jobs come to a rung together, so here all of them report first, and then
    the best `1 / reduction_factor` go on, at least one; of equal ones the first in the sweep.
    """

    def __init__(self, stopping: SweepStoppingConfig):
        self._stopping = stopping

    @override
    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step, asha = trial.last_step, self._stopping.asha
        if asha is None or step is None or step not in self._stopping.rungs(step + 1):
            return False
        trials = study.get_trials(deepcopy=False)
        values = {
            t.number: t.intermediate_values[step] for t in trials if step in t.intermediate_values
        }
        is_higher_better = study.direction == StudyDirection.MAXIMIZE
        best = sorted(values, key=values.__getitem__, reverse=is_higher_better)
        return trial.number not in best[: max(1, len(best) // asha.reduction_factor)]


class Sweep:
    """A sweep whose jobs an engine trains: all of them, or those that one of several workers takes.

    Where workers have their own, the sweep of the process that shows it has no engine. `worker` is
    the number of a worker, and how many there are.
    """

    def __init__(
        self,
        run: RunConfig,
        directory: RunDirectory,
        progress: Progress,
        engine: Engine | None = None,
        worker: tuple[int, int] = (0, 1),
    ):
        assert run.sweep is not None
        self.sweep = run.sweep
        self.metric = run.sweep.metric
        self.stopping = run.sweep.early_stopping
        self._run = run
        self._directory = directory
        self._progress = progress
        self._worker, self._num_workers = worker
        self._written: list[Row] = []
        self._fault = ""
        self.longest = max((trial.job.train.max_steps or 0 for trial in run.trials), default=0)
        if engine is None:
            return
        self._engine = engine
        own = [job for job in engine.jobs.values() if self.sweep.owns(job.name)]
        self.longest = max([self.longest, *(job.total_steps for job in own)])
        for difference in _differences(own, self.metric):
            progress.message(f"warning: sweep: {self.metric} compares jobs roughly: {difference}")
        for job in own:
            self._set_rungs(job)

    def check_reached(self) -> None:
        """Check that the longest job is long enough to be stopped."""
        for fault in () if self.stopping is None else self.stopping.reach_faults(self.longest):
            raise ConfigError(fault)

    def open(self, journal_bytes: int | None = None) -> None:
        """Begin a study, or go on with the one that is there, cut back to so many bytes.

        Where several processes share it, None leaves it whole.
        """
        journal = self._directory.sweep_journal
        try:
            if journal_bytes is not None:
                cut_torn_line(journal, journal_bytes)
                # A process that was killed leaves Optuna's lock, and the next one would wait half a
                # minute for it. The run's own lock says that nobody else is here.
                Path(f"{journal}.lock").unlink(missing_ok=True)
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal))),
                study_name="sweep",
                direction="minimize" if metric_mode(self.metric) == "min" else "maximize",
                load_if_exists=True,
            )
            now = self.sweep.model_dump(mode="json", include={"metric", "parameters"})
            begun = self.study.user_attrs.get("sweep", now)
            self.study.set_user_attr("sweep", begun)
            self._note_length(self.study.user_attrs.get("longest_job", self.longest))
            for trial in self._run.trials[len(self._trials()) :]:
                self.study.enqueue_trial(dict(trial.combination))
        except Exception as error:  # Optuna raises whatever comes of an entry that was edited
            raise ConfigError(
                f"{journal} can't be used: {type(error).__name__}: {error}; if it is damaged, "
                "delete it: what it decided is decided again"
            ) from error
        if changes := describe_changes(begun, now, "sweep"):
            raise ConfigError(
                f"--resume needs the sweep that the run began with, these differ: "
                f"{'; '.join(changes)}; set them back, or give --overwrite to begin again"
            )

    def between_steps(self, engine: Engine) -> None:
        """Report what was measured, stop the jobs that lost, and let others join."""
        with self._noting_faults():
            for trial, name in self._own():
                if trial.state == TrialState.RUNNING:
                    self._report(trial, name)
            # All report before any is judged: jobs of a fused step come to a rung together.
            for trial, name in self._own():
                self._judge(trial, name)
            self._fill()
        if self._num_workers == 1:
            self.show()

    def show(self, *, is_over: bool = False) -> None:
        """Show the ranking, and write table and picture where something was measured or ended."""
        with self._noting_faults():
            rows = self.rows()
            if not rows:
                return
            measured = [row | {"steps": 0, "seconds": ""} for row in rows]
            is_news, self._written = measured != self._written, measured
            table, running = _table(rows), [r["steps"] for r in rows if r["status"] == "running"]
            line = f"sweep: {len(running)} of {self.sweep.num_jobs} jobs train"
            if running:
                line += f", at step {max(running)}/{self.longest}"
            best = min(rows, key=lambda row: row["rank"])
            if best[self.metric] is not None:
                line += f"; best {best['name']}, {self.metric} {best[self.metric]:.4f}"
            self._progress.rank({row["name"] for row in rows}, table, line, is_news)
            if is_news:
                write_output(self._directory.sweep_table, DataFrame(rows).to_csv(index=False))
                if not running:
                    names = [name for _, name in self._begun()]
                    plot_sweep(self.study, names, self.metric, self._directory.sweep_picture)
            if is_over:
                self._progress.conclude(table)

    def rows(self) -> list[Row]:
        """Tell how the jobs stand that have begun, in the order of the sweep.

        Those at their own end are ahead, then those that passed most rungs; by the metric among
        them.
        """
        # Workers note in the study how long their jobs are; who only shows it builds none.
        longest = self.study.user_attrs.get("longest_job", self.longest)
        rungs = () if self.stopping is None else self.stopping.rungs(longest)
        sign = 1 if metric_mode(self.metric) == "min" else -1
        rows: list[Row] = []
        order: list[tuple[bool, bool, int, float]] = []
        for trial, name in self._begun():
            ended, curve = trial.user_attrs.get("ended", {}), trial.intermediate_values
            if trial.state == TrialState.FAIL and not ended:  # it could not be built
                continue
            begun_at = trial.datetime_start or datetime.now()
            running_s = (datetime.now() - begun_at).total_seconds()
            parameters = parameters_of(trial).items()
            status = ended.get("status", _STATUS[trial.state])
            value = ended.get("value", curve[max(curve)] if curve else None)
            passed = sum(rung in curve for rung in rungs) - (status == "stopped")
            if status in ("finished", "stopped early"):  # no rung was left to it
                passed = len(rungs) + 1
            goodness = -sign * (value or 0.0)
            order.append((status != "failed", value is not None, passed, goodness))
            rows.append(
                {
                    **{"name": name, "rank": 0, "status": status},
                    "steps": ended.get("steps", trial.last_step or 0),
                    **{path: format_value(parameter_value(drawn)) for path, drawn in parameters},
                    **{f"{self.metric}@{rung}": curve.get(rung) for rung in rungs},
                    **{self.metric: value, "seconds": f"{ended.get('seconds', running_s):.1f}"},
                }
            )
        best_first = sorted(range(len(rows)), key=order.__getitem__, reverse=True)
        for rank, place in enumerate(best_first, start=1):
            rows[place]["rank"] = rank
        return rows

    @contextmanager
    def _noting_faults(self) -> Iterator[None]:
        """Let files that can't be written, on a full disk for example, not end the training."""
        try:
            yield
        except (ConfigError, OSError, ValueError) as error:  # ValueError: a journal that was edited
            if str(error) != self._fault:
                self._progress.message(f"warning: sweep: {error}")
            self._fault = str(error)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _begun(self) -> list[tuple[FrozenTrial, str]]:
        """Return the trials that don't wait for their turn, with the names of their jobs."""
        begun = [trial for trial in self._trials() if trial.state != TrialState.WAITING]
        return [(trial, self.sweep.job_name(trial.number, parameters_of(trial))) for trial in begun]

    def _own(self) -> list[tuple[FrozenTrial, str]]:
        return [
            (trial, name)
            for trial, name in self._begun()
            if trial.user_attrs.get("worker", 0) % self._num_workers == self._worker
        ]

    def _handle(self, trial: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self.study, trial._trial_id)

    def _note_length(self, total_steps: int) -> None:
        """Let rungs and brackets go up to the longest of the sweep's jobs."""
        self.longest = max(self.longest, total_steps)
        if self.longest > self.study.user_attrs.get("longest_job", -1):
            self.study.set_user_attr("longest_job", self.longest)
        self.study.pruner = _pruner(self.stopping, self.longest)

    def _report(self, trial: FrozenTrial, name: str) -> None:
        """Report the last evaluation of a job that has begun, or tell what became of it."""
        job, result = self._engine.jobs.get(name), self._engine.results.get(name)
        if result is not None:
            step, metrics = result.steps, result.last_metrics
        elif job is not None:
            step, metrics = job.position.evaluated_step, job.position.metrics
        else:
            return
        if self.metric in metrics and step not in trial.intermediate_values:
            self._handle(trial).report(metrics[self.metric], step)
        if result is not None:
            self._tell(trial, result)

    def _tell(self, trial: FrozenTrial, result: JobResult) -> None:
        value = result.metrics.get(self.metric)
        ended = {"status": result.status, "steps": result.steps, "seconds": result.seconds}
        self._handle(trial).set_user_attr("ended", {**ended, "value": value})
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
        is_lost = trial.state == TrialState.PRUNED  # with its files, so that it came again
        if not is_lost:
            if trial.state != TrialState.RUNNING or trial.user_attrs.get("judged") == step:
                return
            if not self._handle(trial).should_prune():
                # It is not called back when others come to this rung later.
                self._handle(trial).set_user_attr("judged", step)
                return
        value = f"{self.metric} {trial.intermediate_values[step]:.4f}"
        result = self._engine.stop(name, f"{value} is not among the best after step {step}")
        if not is_lost:
            self._tell(trial, result)

    def _fill(self) -> None:
        """Let jobs join until as many train as may: first those that have begun already."""
        for trial, name in self._own():
            is_known = name in self._engine.jobs or name in self._engine.results
            if trial.state == TrialState.RUNNING and not is_known:
                self._start(trial, name)
        most = -(-self.sweep.num_concurrent // self._num_workers)
        while sum(name in self._engine.jobs for _, name in self._own()) < most:
            trials = self._trials()
            if all(trial.state != TrialState.WAITING for trial in trials):
                if len(trials) >= self.sweep.num_jobs:
                    return
                self.study.enqueue_trial(self._suggest(trials))
            taken = self.study.ask(self.sweep.distributions)
            taken.set_user_attr("worker", self._worker)
            trial = self._trials()[taken.number]
            self._start(trial, self.sweep.job_name(trial.number, parameters_of(trial)))

    def _suggest(self, trials: list[FrozenTrial]) -> dict[str, Any]:
        """Ask TPE for a combination; if one that was tried comes again and again, it is taken.

        The draw follows from seed, number and study, so a resumed run makes it as an unbroken one.
        """
        search = self.sweep.search
        assert isinstance(search, TpeSearch)
        seed = random.Random(f"{search.seed} {len(trials)}").getrandbits(32)
        # In memory: draws that are not taken leave no trace.
        study = optuna.create_study(direction=self.study.direction, sampler=TPESampler(seed=seed))
        study.add_trials(trials)
        suggested = [study.ask(self.sweep.distributions).params for _ in range(_TPE_TRIES)]
        tried = [parameters_of(trial) for trial in trials]
        return next((params for params in suggested if params not in tried), suggested[0])

    def _start(self, trial: FrozenTrial, name: str) -> None:
        """Let a job join that does not train yet, unless it can't."""
        if name in self._engine.jobs:
            return
        if name in self._engine.results or self._engine.recall(name):
            return self._report(trial, name)
        try:
            config = self._run.trial(trial.number, parameters_of(trial)).job
            job = self._engine.builder.build(config)
            self._set_rungs(job)
            self._note_length(job.total_steps)
            self._engine.add(job, overwrite=True)
        except Exception as error:  # of memory, or of a library that makes initial weights
            if not isinstance(error, LoraloomError | OSError):
                _log.error("%s can't be built", name, exc_info=error)
            self.study.tell(trial.number, state=TrialState.FAIL)
            self._progress.message(f"error: sweep: {name} can't train: {error}")

    def _set_rungs(self, job: Job) -> None:
        if self.stopping is not None:
            job.milestones = frozenset(self.stopping.rungs(job.total_steps))


def parameters_of(trial: FrozenTrial) -> Mapping[str, Any]:
    """Return a trial's parameters, also of one that was taken a moment ago, or waits."""
    return trial.system_attrs.get("fixed_params", trial.params)


def _pruner(stopping: SweepStoppingConfig | None, longest: int) -> BasePruner:
    if stopping is None:
        return NopPruner()
    if (rule := stopping.hyperband) is not None:
        return HyperbandPruner(rule.min_steps, max(longest, rule.min_steps), rule.reduction_factor)
    if (rule := stopping.median) is not None:
        return MedianPruner(rule.min_jobs, rule.min_steps)
    return AshaPruner(stopping)


def _differences(jobs: Sequence[Job], metric: str) -> Iterator[str]:
    """Say why a metric of held-out rows does not measure jobs alike, if it doesn't."""
    if metric in {one.metric for job in jobs for one in job.config.eval}:
        return
    if len({job.held_out for job in jobs}) > 1:
        yield "they hold out other rows, as seed, data or max_length differ; give data.validation"
    objectives = {job.config.train.objective.model_dump_json() for job in jobs}
    if metric_mode(metric) == "min" and len(objectives) > 1:
        yield "their objectives differ; take metric: eval/rewards/accuracies"


def _table(rows: Sequence[Row]) -> Table:
    """The rows for people, the best first."""
    columns = [column for column in rows[0] if column not in ("rank", "name", "status", "seconds")]
    table = make_table("", "job", values=[*map(Text, columns), "status"])
    for row in sorted(rows, key=lambda row: row["rank"]):
        values = ("-" if row[column] is None else row[column] for column in columns)
        texts = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in values)
        # As Text: a template among the parameters may look like rich's markup.
        cells = [Text(plain(text)) for text in texts]
        style = None if row["status"] in ("running", "finished") else "dim"
        table.add_row(str(row["rank"]), row["name"], *cells, row["status"], style=style)
    return table


def plot_sweep(study: optuna.Study, names: Sequence[str], metric: str, path: Path) -> Figure | None:
    """Draw the metric by step for every job, and the importance of the parameters for it.

    Jobs that were stopped are grey and end in a cross. Nothing is drawn before an evaluation.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values]
    if not trials:
        return None
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = {}
    for trial in trials:
        curve = sorted(trial.intermediate_values.items())
        is_stopped = trial.state == TrialState.PRUNED
        style: dict[str, Any] = {"color": "0.6", "marker": "x"} if is_stopped else {"marker": "o"}
        (lines[trial.number],) = left.plot(*zip(*curve, strict=True), markevery=[-1], **style)
    is_higher_better = study.direction == StudyDirection.MAXIMIZE
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    finished.sort(key=lambda trial: trial.value or 0.0, reverse=is_higher_better)
    if best := [trial.number for trial in finished[:_MAX_NAMES]]:
        left.legend([lines[one] for one in best], [names[one] for one in best], fontsize="small")
    left.set(xlabel="step", ylabel=metric)
    # Jobs compare at the last step at which all of them were measured.
    step = max(set.intersection(*(set(one.intermediate_values) for one in trials)), default=None)
    if step is not None and len({trial.intermediate_values[step] for trial in trials}) > 1:
        compared = optuna.create_study(direction=study.direction)
        for one in trials:
            value, drawn = one.intermediate_values[step], (one.params, one.distributions)
            compared.add_trial(create_trial(params=drawn[0], distributions=drawn[1], value=value))
        importances = get_param_importances(compared)
        right.barh(list(importances), list(importances.values()))
        right.set(xlabel=f"importance for {metric} after step {step}", xlim=(0, 1))
        right.invert_yaxis()
    return save_figure(figure, path)
