"""From a run file's settings to trained adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

import loraloom
from loraloom.config.run import JobConfig, RunConfig
from loraloom.data.training_set import TrainingSet, load_training_set
from loraloom.errors import ConfigError, DataError, LoraloomError
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.train.checkpoint import Snapshot, describe_changes
from loraloom.train.engine import Engine, Surroundings, describe_base
from loraloom.train.evaluation import Evaluation, Evaluator
from loraloom.train.job import Job
from loraloom.train.outputs import RunDirectory
from loraloom.train.progress import NoProgress, Progress
from loraloom.train.reference import load_reference
from loraloom.train.results import JobResult, describe_environment
from loraloom.train.start import load_start
from loraloom.train.tracking import check_trackers


def train(
    run: RunConfig,
    evaluator: Evaluator,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> list[JobResult]:
    """Train all jobs of a run on its base model.

    Everything is read and checked before the first file is written.

    Args:
        run: What the run file says.
        evaluator: Scores choice questions.
        resume: Go on from the newest checkpoint, if there is any.
        overwrite: Replace earlier results of these jobs.
        progress: Shows the run; None for nothing.
        command: What result.json says the run was started with.

    Returns:
        What became of each job; a failed one has an `error`.

    Raises:
        ConfigError: If results are in the way, there is nothing to resume, or a setting is wrong.
        ModelError, AdapterError, DataError: If the base model, an adapter or data can't be had.
        KeyboardInterrupt: After Ctrl-C, when everything is saved.
    """
    _check(run, resume=resume, overwrite=overwrite)
    model, tokenizer = load_base_model(
        run.base_model, run.dtype, run.device, run.attn_implementation
    )
    host = loraloom.attach(model)
    return train_on_host(
        host,
        tokenizer,
        run,
        evaluator,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        command=command,
    )


def train_on_host(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    run: RunConfig,
    evaluator: Evaluator,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> list[JobResult]:
    """Train as `train` does on a base model that is loaded already.

    Gradient checkpointing is a matter of the whole forward: it is on if any job asks for it.
    Gradients are the same.
    """
    progress = progress or NoProgress()
    directory = _check(run, resume=resume, overwrite=overwrite)
    snapshot, faults = directory.snapshots.newest() if resume else (None, [])
    if snapshot is not None:
        _check_same_run(snapshot, run, describe_base(host))
    elif faults:
        raise ConfigError("\n".join([*faults, "--resume needs a whole one, there is none"]))
    evaluation = Evaluation(host, tokenizer, evaluator)
    jobs = _build_jobs(host, tokenizer, run.jobs)
    evaluation.read(run.jobs)
    host.enable_gradient_checkpointing(any(job.train.gradient_checkpointing for job in run.jobs))
    environment = describe_environment(host.device, host.dtype, command)
    surroundings = Surroundings(directory, progress, run.trackers, environment)
    engine = Engine(host, jobs, evaluation, surroundings)
    _say(progress, [*faults, *_describe_data(jobs)])
    if snapshot is not None:
        _say(progress, [f"going on after {snapshot.round} fused steps"])
        engine.load_state(snapshot)
    else:
        directory.prepare([job.name for job in run.jobs])
        engine.save_state()
    return engine.run()


def _check(run: RunConfig, *, resume: bool, overwrite: bool) -> RunDirectory:
    directory = RunDirectory(run.output_dir)
    directory.check(resume=resume, overwrite=overwrite)
    check_trackers(run.trackers)
    return directory


def _build_jobs(
    host: Host, tokenizer: PreTrainedTokenizerBase, configs: Sequence[JobConfig]
) -> list[Job]:
    """Add the adapters and read the data; jobs with the same data and seed share them."""
    training_sets: dict[tuple[Any, ...], TrainingSet] = {}
    jobs = []
    for config in configs:
        try:
            adapter = host.add(config.name, config.adapter, config.seed)
            if config.start_from is not None:
                load_start(host, adapter, config.start_from)
            reference = load_reference(host, config.train.objective)
            max_length, as_pairs = config.train.max_length, config.train.learns_from_pairs
            key = (config.data.model_dump_json(), max_length, config.seed, as_pairs)
            if key not in training_sets:
                training_sets[key] = load_training_set(
                    config.data, tokenizer, max_length, config.seed, as_pairs=as_pairs
                )
            _check_enough(config, training_sets[key])
            jobs.append(Job(config, adapter, training_sets[key], reference))
        except LoraloomError as error:
            raise type(error)(f"job {config.name}: {error}") from error
    return jobs


def _check_enough(config: JobConfig, training_set: TrainingSet) -> None:
    missing = "learn from" if not training_set.examples else "measure eval/loss on"
    if not training_set.examples or (config.data.has_validation and not training_set.validation):
        raise DataError(
            f"data must have examples to {missing}, got none ({'; '.join(training_set.report)}); "
            "give more rows, or raise max_length"
        )


def _describe_data(jobs: Sequence[Job]) -> list[str]:
    return [f"{job.name}: {line}" for job in jobs for line in job.training_set.report]


def _say(progress: Progress, lines: Sequence[str]) -> None:
    for line in lines:
        progress.message(line)


def _check_same_run(snapshot: Snapshot, run: RunConfig, base: dict[str, Any]) -> None:
    """Check that what goes on is what was saved.

    Raises:
        ConfigError: If the base model or a setting of a job is another one.
    """
    changed = [f"base {name}" for name, value in base.items() if snapshot.base.get(name) != value]
    for job in run.jobs:
        record = snapshot.jobs.get(job.name)
        if record is not None:
            changes = describe_changes(record.settings, job.model_dump(mode="json"))
            changed += [f"job {job.name}: {change}" for change in changes]
    if changed:
        raise ConfigError(
            "--resume needs the settings that the run began with, these differ: "
            f"{'; '.join(changed)}; set them back, or give --overwrite to begin again"
        )
