"""Hashes of what a job learns from and is measured on, so that a run goes on with the same."""

from __future__ import annotations

from collections.abc import Mapping

from loraloom.data.questions import questions_digest
from loraloom.errors import ConfigError
from loraloom.eval.provenance import adapter_digest
from loraloom.models.host import Host
from loraloom.training.run.evaluation import Evaluation
from loraloom.training.run.job import Job


def input_digests(host: Host, job: Job, evaluation: Evaluation) -> dict[str, str]:
    """Hash a job's encoded examples, its questions and its reference's weights."""
    digests = {"examples": job.training_set.digest}
    if job.config.eval:
        sets = (evaluation.questions.get(config, []) for config in job.config.eval)
        digests["questions"] = " ".join(map(questions_digest, sets))
    if job.reference is not None and job.reference.adapter_name is not None:
        digests["reference"] = adapter_digest(host.adapter(job.reference.adapter_name))
    return digests


def check_inputs(
    saved: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> None:
    """Check that jobs keep what they began with (older snapshots have no hashes)."""
    changed = [
        f"job {name}: {what}"
        for name, inputs in now.items()
        if name in saved
        for what, digest in inputs.items()
        if saved[name].get(what, digest) != digest
    ]
    if changed:
        raise ConfigError(
            "--resume needs the data that the run began with, it has changed: "
            f"{'; '.join(changed)}; put it back, or give --overwrite to begin again"
        )
