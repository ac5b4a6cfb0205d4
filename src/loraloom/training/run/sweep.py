"""A sweep while it trains: jobs that do badly at a rung are stopped, the others are ranked.

Jobs that come to a rung between the same two fused steps are recorded first and then judged
together; those that come later are judged against all that came before. So jobs of the same length,
which train in the same steps, get plain successive halving, and no job ever waits.

What is decided follows from the jobs' positions and the metrics that were recorded, so that a
resumed sweep decides as an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from loraloom.config.run import RunConfig
from loraloom.config.sweep import AshaConfig
from loraloom.config.trials import Trial
from loraloom.durable import write_output
from loraloom.errors import ConfigError
from loraloom.training.run.engine import Engine
from loraloom.training.run.job import Job
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import Progress
from loraloom.training.run.ranking import Ranking, Standing, ranking_csv, survivors
from loraloom.training.run.results import JobResult
from loraloom.training.run.selection import metric_mode
from loraloom.training.run.tracking import read_curve


class Sweep:
    """The jobs of a sweep.

    Args:
        run: With a sweep.
        directory: Of the run's results.
        progress: Shows the ranking.
        jobs: Those that are not done; others than the sweep's are left alone.

    Raises:
        ConfigError: If no job is long enough to reach a rung.
    """

    def __init__(
        self, run: RunConfig, directory: RunDirectory, progress: Progress, jobs: Iterable[Job]
    ):
        assert run.sweep is not None
        stopping = run.sweep.early_stopping
        self._metric = run.sweep.metric
        self._asha = None if stopping is None else stopping.asha
        self._trials = run.trials
        self._directory = directory
        self._progress = progress
        self._curves: dict[str, dict[int, float]] = {trial.name: {} for trial in run.trials}
        self._total_steps = {trial.name: trial.job.train.max_steps for trial in run.trials}
        self._written: list[tuple[Any, ...]] = []
        self._is_drawn = False
        own = [job for job in jobs if job.name in self._curves]
        self._total_steps |= {job.name: job.total_steps for job in own}
        for difference in _differences(own, self._metric):
            progress.message(f"warning: sweep: {self._metric} compares jobs roughly: {difference}")
        if self._asha is not None:
            if len(own) == len(run.trials):  # else the run goes on: it was checked when it began
                self._asha.check_reached([job.total_steps for job in own])
            _set_rungs(own, self._asha)

    def between_steps(self, engine: Engine) -> None:
        """Record what was measured, stop the jobs that lost, and show how they stand."""
        self._record(engine)
        if self._asha is not None:
            self._halve(engine, self._asha)
        self._show(self.ranking(engine))
        if not self._is_drawn and self._curves.keys() <= engine.results.keys():
            self._draw(self.ranking(engine))
            self._is_drawn = True

    def restore(self) -> None:
        """Take in what was measured before the run was interrupted, after the state was loaded."""
        for name in self._curves:
            metrics = self._directory.metrics(name)
            if metrics.exists():
                self._curves[name] = dict(read_curve(metrics, self._metric))

    def finish(self, engine: Engine) -> None:
        """Show the ranking a last time."""
        self._progress.conclude(self.ranking(engine))

    def ranking(self, engine: Engine) -> Ranking:
        """Tell how the jobs stand."""
        rungs = self._rungs()
        standings = tuple(self._standing(trial, engine, rungs) for trial in self._trials)
        return Ranking(self._metric, rungs, standings)

    def _record(self, engine: Engine) -> None:
        """Take in the last evaluation of each job."""
        for name, curve in self._curves.items():
            if name in engine.results:
                result = engine.results[name]
                step, metrics = result.steps, result.last_metrics
                if result.status == "finished":
                    self._total_steps[name] = step
            elif name in engine.jobs:
                position = engine.jobs[name].position
                step, metrics = position.evaluated_step, position.metrics
            else:
                continue
            if self._metric in metrics:
                curve[step] = metrics[self._metric]

    def _halve(self, engine: Engine, asha: AshaConfig) -> None:
        """Stop the jobs that stand at a rung and are not among its best."""
        for rung in self._rungs():
            values = {name: curve[rung] for name, curve in self._curves.items() if rung in curve}
            kept = survivors(values, asha.reduction_factor, self._metric)
            lost = [name for name in values if name not in kept]
            for name in lost:
                job = engine.jobs.get(name)
                if job is not None and job.at_boundary and job.position.step == rung:
                    engine.stop(name, self._reason(values, name, len(kept)))

    def _reason(self, values: dict[str, float], name: str, num_kept: int) -> str:
        return (
            f"{self._metric} {values[name]:.4f} is not among the best {num_kept} of {len(values)}"
        )

    def _rungs(self) -> tuple[int, ...]:
        """All rungs that a job may reach."""
        if self._asha is None:
            return ()
        lengths = {length for length in self._total_steps.values() if length is not None}
        return tuple(sorted({rung for length in lengths for rung in self._asha.rungs_of(length)}))

    def _standing(self, trial: Trial, engine: Engine, rungs: tuple[int, ...]) -> Standing:
        curve = self._curves[trial.name]
        standing = Standing(
            trial.name,
            trial.parameters,
            total_steps=self._total_steps[trial.name],
            rung_values={rung: curve[rung] for rung in rungs if rung in curve},
            value=curve[max(curve)] if curve else None,
            seconds=engine.seconds,
        )
        if trial.name in engine.results:
            return self._ended(standing, engine.results[trial.name])
        return replace(standing, steps=engine.jobs[trial.name].position.step)

    def _ended(self, standing: Standing, result: JobResult) -> Standing:
        return replace(
            standing,
            status=result.status,
            steps=result.steps,
            value=result.metrics.get(self._metric),
            seconds=result.seconds,
        )

    def _draw(self, ranking: Ranking) -> None:
        """Write the picture."""
        from loraloom.eval.sweep_plot import plot_sweep  # matplotlib takes a second to import

        stopped = {one.name for one in ranking.standings if one.status == "stopped"}
        parameters = {trial.name: trial.parameters for trial in self._trials}
        curves = {
            one.name: sorted(self._curves[one.name].items())
            for one in ranking.ranked
            if self._curves[one.name]
        }
        picture = self._directory.sweep_picture
        with self._noting_faults():
            if curves:
                plot_sweep(curves, parameters, stopped, self._metric, picture)

    @contextmanager
    def _noting_faults(self) -> Iterator[None]:
        """Let a file that can't be written, on a full disk say, not end the training."""
        try:
            yield
        except (ConfigError, OSError) as error:
            self._progress.message(f"warning: {error}")

    def _show(self, ranking: Ranking) -> None:
        self._progress.rank(ranking)
        if ranking.measured != self._written:
            self._written = ranking.measured
            with self._noting_faults():
                write_output(self._directory.sweep_table, ranking_csv(ranking))


def _set_rungs(jobs: list[Job], asha: AshaConfig) -> None:
    """Have jobs evaluated at their rungs."""
    for job in jobs:
        job.milestones = frozenset(asha.rungs_of(job.total_steps))


def _differences(jobs: list[Job], metric: str) -> list[str]:
    """Say why a metric of held-out rows does not measure jobs alike, if it doesn't."""
    if metric in {one.metric for job in jobs for one in job.config.eval}:
        return []
    found = []
    training_sets = {id(job.training_set): job.training_set for job in jobs}
    held_out = {
        tuple(row.input_ids for example in one.validation for row in example.rows)
        for one in training_sets.values()
    }
    if len(held_out) > 1:
        found.append(
            "they hold out other rows, as seed, data or max_length differ; give data.validation"
        )
    objectives = {job.config.train.objective.model_dump_json() for job in jobs}
    if metric_mode(metric) == "min" and len(objectives) > 1:
        found.append("their objectives differ; take metric: eval/rewards/accuracies")
    return found
