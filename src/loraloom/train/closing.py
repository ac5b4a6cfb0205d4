"""Writing what a job leaves behind."""

from __future__ import annotations

from loraloom.formats.files import read_adapter, write_adapter
from loraloom.models.host import Host
from loraloom.train.job import Job
from loraloom.train.outputs import RunDirectory
from loraloom.train.results import JobResult, result_card


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
