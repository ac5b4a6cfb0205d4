"""`loraloom train`: from a run file to trained adapters, and what to type next."""

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field
from rich.table import Table
from typing_extensions import override

from loraloom.cli.options import BASE, Sets
from loraloom.config.data import MAX_LENGTH
from loraloom.config.fields import StrictModel
from loraloom.errors import TrainingError
from loraloom.terminal import make_console, make_table, print_tables
from loraloom.training import run as training
from loraloom.training.job import JobResult
from loraloom.training.reporting import Progress
from loraloom.training.settings import JobConfig, RunConfig, load_run_config
from loraloom.training.watched_directory import WatchOptions

MAX_ADAPTERS = 8


class TrainOptions(StrictModel):
    """What becomes of earlier results, and where else jobs come from."""

    resume: bool = False
    """Resume from the newest checkpoint, if one exists."""
    overwrite: bool = False
    """Replace earlier results of these jobs."""
    watch: Path | None = None
    """Keep running, and train job files added to this directory."""
    watch_exit_when_idle: bool = False
    """Stop when all files of --watch are done."""
    ray: str | None = None
    """Train on the devices of a Ray cluster: auto (this machine's, or else a temporary one) or
    HOST:PORT."""
    ray_workers: int | None = Field(default=None, ge=1)
    """Use N devices of --ray. Default: all accelerators, or else one worker per machine."""

    @override
    def contradictions(self) -> Iterator[str]:
        if self.watch_exit_when_idle and self.watch is None:
            yield "--watch-exit-when-idle requires --watch DIR"
        if self.ray_workers is not None and self.ray is None:
            yield "--ray-workers requires --ray"


def train(
    run_file: Path,
    /,
    *,
    overrides: Sets = (),
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
) -> None:
    """Train the adapters of a run file together on one base model.

    With `torchrun --nproc-per-node N -m loraloom train RUN.yaml`, N processes share the rows.

    Ctrl-C, SIGTERM or SIGHUP saves a checkpoint for --resume; a second signal stops at once. If
    output cannot be written (a closed pipe), training continues without output.

    Args:
        run_file: YAML file with a base model and jobs.
    """
    run = load_run_config(run_file, overrides)
    console = make_console(quiet=training.read_launch().rank > 0)
    results = training.train(
        run,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=Progress(console),
        watch=options.watch
        and WatchOptions(options.watch, options.overwrite, options.watch_exit_when_idle),
        ray=options.ray,
        ray_workers=options.ray_workers,
        command=shlex.join(["loraloom", *sys.argv[1:]]),
    )
    others = [one for one in results if run.sweep is None or not run.sweep.owns(one.job)]
    if others:
        print_tables(console, [_results_table(others)])
    for purpose, command in next_commands(run, results).items():
        console.print(f"\n{purpose} with:\n  {command}", soft_wrap=True)
    raise_failures(results)


def _results_table(results: Sequence[JobResult]) -> Table:
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics))
    table = make_table("job", values=["method", "steps", "status", "weights", *metrics])
    for one in results:
        measured = (one.metrics.get(name) for name in metrics)
        texts = ("-" if value is None else f"{value:.4f}" for value in measured)
        table.add_row(one.job, one.method, str(one.steps), one.status, one.weights, *texts)
    return table


def raise_failures(results: Sequence[JobResult]) -> None:
    """Raise a TrainingError that names every job that failed."""
    failures = [result.error for result in results if result.error is not None]
    if failures:
        raise TrainingError("\n".join(failures))


def next_commands(run: RunConfig, results: Sequence[JobResult]) -> dict[str, str]:
    """Write commands that evaluate and ask what was trained; none where nothing was."""
    good = [result for result in results if result.error is None and result.status != "stopped"]
    if not good:
        return {}
    if run.sweep is not None:
        metric = run.sweep.metric
        # the best first; a job that was never measured goes last, whichever way is better
        sign = 1 if metric.endswith("loss") else -1
        good.sort(key=lambda one: sign * one.metrics.get(metric, sign * math.inf))
    jobs, measured = run.all_jobs, good
    purpose = "Evaluate"
    if best := next((job for job in run.trials if job.name == good[0].job), None):
        jobs = [job for job in run.trials if _data_names(job) == _data_names(best)]
        names = {job.name for job in jobs}
        others = [job.name for job in run.trials if job.name not in names]
        if others:  # they are measured on other data
            measured = [result for result in good if result.job in names]
            purpose += f" the jobs of {_data_names(best)}, and others on their data,"
    if len(measured) > MAX_ADAPTERS:
        purpose += f" ({MAX_ADAPTERS} of {len(measured)} adapters)"
    asked = [*_model_options(run, measured), *_questions(jobs)]
    generated = [*_model_options(run, good), ("--prompt", "Hello!")]
    return {purpose: _command("eval", asked), "Generate": _command("generate", generated)}


def _data_names(job: JobConfig) -> str:
    return ", ".join(str(source.task or source.dataset) for source in job.data.sources)


def _model_options(run: RunConfig, results: Sequence[JobResult]) -> list[tuple[str, str]]:
    options = [("--base-model", run.base_model)]
    if run.quantization is not None:
        options.append(("--quantization", run.quantization))
    for result in results[:MAX_ADAPTERS]:
        name = result.job if result.job != BASE else f"{BASE}-adapter"
        options.append(("--adapter", f"{name}={result.directory}"))
    return options


def _questions(jobs: Sequence[JobConfig]) -> list[tuple[str, str]]:
    """Options of `loraloom eval` for the first data on which jobs are measured."""
    asked_of = [one for job in jobs for one in job.eval]
    trained_on = [one for job in jobs for one in job.data.sources]
    if first := next((one for one in (*asked_of, *trained_on) if one.task), None):
        is_seen = first not in asked_of and Path(first.path or "").expanduser().is_file()
        data = "HELD_OUT.jsonl" if is_seen else first.path
        asked = {"--task": first.task, "--scoring": first.scoring, "--data": data}
        asked |= {"--split": first.split} if first in asked_of else {}
    else:
        given = (job.data.validation for job in jobs)
        held_out = next((one for one in given if one and one.dataset), None)
        source = held_out or next(iter(trained_on), None)
        # what adapters don't tell: columns, and a format that is not that of the prompts
        names = {"fields"} if held_out is None else {"fields", "split", "config"}
        if source is not None and source.format == "preference":
            names.add("template")
        own = {} if source is None else source.model_dump(include=names, exclude_none=True)
        data = "HELD_OUT.jsonl" if held_out is None else held_out.dataset
        asked = {"--dataset": json.dumps({"dataset": data, **own}) if own else data}
        asked |= {"--format": source.format} if source and source.format == "preference" else {}
        length = max((job.train.max_length for job in jobs), default=MAX_LENGTH)
        asked |= {"--max-length": str(length)} if length != MAX_LENGTH else {}
    return [(option, value) for option, value in asked.items() if value]


def _command(verb: str, options: Sequence[tuple[str, str]]) -> str:
    return " \\\n    ".join([f"loraloom {verb}", *map(shlex.join, options)])
