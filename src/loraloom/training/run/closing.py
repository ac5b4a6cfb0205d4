"""What a job leaves behind: its files, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from loraloom.errors import LoraloomError
from loraloom.formats.files import read_adapter, write_adapter
from loraloom.models.host import Host
from loraloom.training.run.job import Job
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.results import JobResult, job_result, result_card


class Closing:
    """Writes what jobs leave behind.

    Args:
        host: With their adapters.
        directory: Of the run's results.
        environment: Goes into each result.json.
    """

    def __init__(self, host: Host, directory: RunDirectory, environment: Mapping[str, Any]):
        self._host = host
        self._directory = directory
        self._environment = dict(environment)

    def close(
        self, job: Job, seconds: float, error: str | None, stop_reason: str | None
    ) -> tuple[JobResult, dict[str, Any] | None]:
        """Write a job's files. If they can't be written, it has failed.

        Args:
            job: At its end.
            seconds: Wall time of the run so far.
            error: Why it failed.
            stop_reason: Why it was stopped.

        Returns:
            What became of it, and what a later process needs to write its files, where it was
            complete and this one could not.
        """
        result = self._result(job, seconds, error, stop_reason)
        try:
            write_job(self._host, job, self._directory, result)
        except Exception as fault:
            reason = f"its files can't be written: {describe_fault(fault)}"
            fault_too = f"{error or f'job {job.name}'}: {reason}"
            result = self._result(job, seconds, fault_too, stop_reason)
            with suppress(OSError):
                result.write(self._directory.job(job.name))
            was_complete = error is None and stop_reason is None
            return result, job.state_dict() if was_complete else None
        return result, None

    def _result(
        self, job: Job, seconds: float, error: str | None, stop_reason: str | None
    ) -> JobResult:
        return job_result(
            job,
            self._host.base,
            self._directory.job(job.name),
            error=error,
            stop_reason=stop_reason,
            seconds=seconds,
            environment=self._environment,
        )


def write_job(host: Host, job: Job, directory: RunDirectory, result: JobResult) -> None:
    """Write a job's last weights, the adapter's files and result.json.

    The adapter's files are its best weights where an evaluation has chosen any, else the last.

    Raises:
        LoraloomError, OSError: If something can't be written, or the best weights can't be read.
    """
    name, base = job.name, host.base
    host.save(name, directory.last(name), overwrite=True)
    tensors = job.adapter.tensors()
    if job.selection.step is not None:
        tensors = read_adapter(directory.best(name), base)[1]
    card = result_card(result, job, base)
    config, target = job.adapter.config, directory.job(name)
    write_adapter(target, config, tensors, base, card, overwrite=True)
    result.write(target)


def describe_fault(error: Exception) -> str:
    """Say what an exception says, with its kind unless it is one of ours."""
    return str(error) if isinstance(error, LoraloomError) else f"{type(error).__name__}: {error}"
