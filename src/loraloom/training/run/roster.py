"""The jobs of a run: those that train, what became of the others, what snapshots say of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from loraloom.errors import ConfigError
from loraloom.training.run.checkpoint import JobRecord, Snapshot, Status
from loraloom.training.run.job import Job
from loraloom.training.run.results import JobResult, parse_result


class Roster:
    """Jobs in their order."""

    def __init__(self):
        self.jobs: dict[str, Job] = {}
        self._results: dict[str, JobResult] = {}
        self._records: dict[str, JobRecord] = {}
        self._unwritten: dict[str, dict[str, Any]] = {}

    @property
    def results(self) -> dict[str, JobResult]:
        """What became of the jobs that are done, by name."""
        return {name: self._results[name] for name in self._records if name in self._results}

    @property
    def states(self) -> dict[str, dict[str, Any]]:
        """What a later process needs to go on with each job that has something to go on from."""
        running = {
            name: job.state_dict()
            for name, job in self.jobs.items()
            if job.position.tokens > 0  # before, the seed says it all
        }
        return self._unwritten | running

    @property
    def joined(self) -> set[str]:
        """Names of the jobs that joined a run that had begun."""
        return {name for name, record in self._records.items() if record.joined_later}

    def check_new(self, name: str) -> None:
        """Check that no job of the run has a name.

        Raises:
            ConfigError: If one has it, be it in another case.
        """
        if any(other.casefold() == name.casefold() for other in self._records):
            raise ConfigError(f"job name must be new in this run, got {name!r} again")

    def enter(self, job: Job, *, joined_later: bool) -> None:
        """Add a job that trains."""
        self.jobs[job.name] = job
        self._records[job.name] = JobRecord("running", _settings(job), joined_later=joined_later)

    def leave(self, name: str, result: JobResult, state: dict[str, Any] | None = None) -> None:
        """Note what became of a job.

        Args:
            name: Of a job that trains.
            result: What became of it.
            state: What a later process needs to write its files, where this one could not.
        """
        del self.jobs[name]
        self._results[name] = result
        if state is not None:
            self._unwritten[name] = state

    def records(
        self, metrics_bytes: Callable[[str], int], passes: Mapping[str, float]
    ) -> dict[str, JobRecord]:
        """Return what a snapshot says of each job.

        Args:
            metrics_bytes: Tells the length of a job's metrics.jsonl.
            passes: Of the schedule.
        """
        return {
            name: replace(
                self._records[name],
                **self._outcome(name),
                metrics_bytes=metrics_bytes(name),
                sha256=None,
                scheduler_pass=passes.get(name, 0.0),
            )
            for name in self._records
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; jobs that it doesn't know begin, those that it has done are done.

        Settings stay as they are: they may differ in what changes no result.
        """
        for name, record in snapshot.jobs.items():
            if record.result is not None:
                self._results[name] = parse_result(record.result)
            elif (state := snapshot.load_state(name)) is not None:
                self.jobs[name].load_state_dict(state)
        new = {name: one for name, one in self._records.items() if name not in snapshot.jobs}
        self._records = {**snapshot.jobs, **new}
        for name, job in self.jobs.items():
            self._records[name] = replace(self._records[name], settings=_settings(job))

    def metrics_bytes(self, name: str) -> int:
        """Return the length that a job's metrics.jsonl had when it was saved."""
        return self._records[name].metrics_bytes

    def _outcome(self, name: str) -> dict[str, Any]:
        result = self._results.get(name)
        if result is None or name in self._unwritten:
            return {"status": "running", "result": None}
        status: Status = "finished" if result.status == "stopped early" else result.status
        return {"status": status, "result": asdict(result)}


def _settings(job: Job) -> dict[str, Any]:
    return job.config.model_dump(mode="json")
