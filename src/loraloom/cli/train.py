"""`loraloom train`: from a run file to trained adapters, and what to type next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table
from typing_extensions import override

from loraloom.cli.options import BASE, LocalPath, RayOptions, Sets
from loraloom.config.fields import StrictModel
from loraloom.config.model import AttnImplementation, BaseDtype, quantization_option
from loraloom.errors import TrainingError
from loraloom.terminal import make_console, make_table, print_tables
from loraloom.training import run as training
from loraloom.training.inbox import WatchOptions
from loraloom.training.parallel import read_launch
from loraloom.training.progress import Progress
from loraloom.training.results import JobResult
from loraloom.training.settings import JobConfig, RunConfig, load_run_config

# Adapters in a command; of a sweep the best ones.
MAX_ADAPTERS = 8


class TrainOptions(RayOptions):
    """What becomes of earlier results, and where else jobs come from."""

    resume: bool = False
    """Go on from the newest checkpoint, if there is one."""
    overwrite: bool = False
    """Replace earlier results of these jobs."""
    watch: LocalPath | None = None
    """Go on, and train the job files that come into this directory too."""
    watch_exit_when_idle: bool = False
    """With --watch: end when all files are done."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.watch_exit_when_idle and self.watch is None:
            yield "--watch-exit-when-idle has no effect without --watch DIR; give it"


class ModelChanges(StrictModel):
    """What takes the place of the run file's settings."""

    dtype: BaseDtype | None = None
    """Load the base model in this number format, in place of the run file's."""
    quantization: str | None = None
    """Quantize the base model so, in place of the run file's."""
    device: str | None = None
    """Run on this device, in place of the run file's."""
    attn_implementation: AttnImplementation | None = None
    """Compute attention so, in place of the run file's."""


def train(
    run_file: LocalPath,
    /,
    *,
    overrides: Sets | None = None,
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
    model: Annotated[ModelChanges, Parameter(name="*")] = ModelChanges(),
) -> None:
    """Train the adapters of a run file, all of them together on one base model.

    With `torchrun --nproc-per-node N -m loraloom train RUN.yaml`, N processes share the rows.

    Ctrl-C, SIGTERM or SIGHUP saves everything for --resume; a second one ends at once. Output
    that can't be written, to a closed pipe say, is lost; training goes on.

    Args:
        run_file: A base model and its jobs.
    """
    changes = [f"{name}={value}" for name, value in model.model_dump(exclude_none=True).items()]
    run = load_run_config(run_file, [*(overrides or ()), *changes])
    console = make_console(quiet=read_launch().rank > 0)
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
    commands = {
        "Evaluate": evaluation_command(run, results),
        "Generate": generation_command(run, results),
    }
    for purpose, command in commands.items():
        if command is not None:
            console.print(f"\n{purpose} with:\n  {command}", soft_wrap=True)
    raise_failures(results)


def _results_table(results: Sequence[JobResult]) -> Table:
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics))
    titles = ["method", "steps", "status", "weights", *metrics]
    table = make_table("job", values=titles)
    for result in results:
        measured = (result.metrics.get(name) for name in metrics)
        table.add_row(
            *(result.job, result.method, str(result.steps), result.status, result.weights),
            *("-" if value is None else f"{value:.4f}" for value in measured),
        )
    return table


def raise_failures(results: Sequence[JobResult]) -> None:
    """Raise a TrainingError that names every job that failed."""
    failures = [result.error for result in results if result.error is not None]
    if failures:
        raise TrainingError("\n".join(failures))


def evaluation_command(run: RunConfig, results: Sequence[JobResult]) -> str | None:
    """Write the command, an option a line; None where there is nothing to evaluate.

    It asks what the first job was measured on, or what it learnt from where that has other splits.
    Adapters of jobs that would be asked something else are left out.
    """
    good, jobs = _good(run, results), {job.name: job for job in run.all_jobs}
    if run.sweep is not None and run.trials:  # TPE's later jobs differ from the first in values
        owned = [one.job for one in good if run.sweep.owns(one.job)]
        jobs = dict.fromkeys(owned, run.trials[0]) | jobs
    asked = {one.job: _asked(jobs[one.job]) for one in good if one.job in jobs}
    first = next(filter(None, asked.values()), None)
    if first is None:
        return None
    adapters = [one for one in good if asked.get(one.job) == first]
    output = shlex.join(["--output", str(run.output_dir / "eval.json")])
    return _command("eval", run, adapters, first, output)


def generation_command(run: RunConfig, results: Sequence[JobResult]) -> str | None:
    """Write the command that asks what was trained, an option a line; None if nothing was."""
    good = _good(run, results)
    return _command("generate", run, good, "--prompt 'Hello!'") if good else None


def _good(run: RunConfig, results: Sequence[JobResult]) -> list[JobResult]:
    # a sweep's best first, as a command has MAX_ADAPTERS of them
    good = [result for result in results if result.error is None and result.status != "stopped"]
    if run.sweep is not None:
        metric = run.sweep.metric
        # a job that was never measured goes last, whichever way is better
        sign = 1 if metric.endswith("loss") else -1
        good.sort(key=lambda one: sign * one.metrics.get(metric, sign * float("inf")))
    return good


def _command(verb: str, run: RunConfig, adapters: Sequence[JobResult], *options: str) -> str:
    words = [f"loraloom {verb} --base-model {shlex.quote(run.base_model)}"]
    words += filter(None, [quantization_option(run.quantization)])
    for one in adapters[:MAX_ADAPTERS]:
        # a job may be called as evaluations call the base model
        name = f"{one.job}-adapter" if one.job == BASE else one.job
        words.append(shlex.join(["--adapter", f"{name}={one.directory}"]))
    return " \\\n    ".join([*words, *options])


def _asked(job: JobConfig) -> str:
    """The options that say what is asked."""
    held_out = job.data.validation
    source, *more = job.data.sources if held_out is None else [held_out]
    tasks = [one for one in (*job.eval, source, *more) if one.task is not None]
    if tasks:
        first = tasks[0]
        alike = [one for one in tasks if (one.scoring, one.path) == (first.scoring, first.path)]
        names = ",".join(dict.fromkeys(str(one.task) for one in alike))
        options = {"--task": names, "--scoring": first.scoring, "--data": first.path}
    elif held_out is not None and held_out.config is not None:  # eval can't be told it
        return ""
    else:
        beta = getattr(job.train.objective, "beta", None)
        options = {
            "--dataset": "HELD_OUT.jsonl" if held_out is None else source.dataset,
            "--split": None if held_out is None else source.split,
            "--format": source.format,
            "--template": source.template,
            "--chat-template": source.chat_template,
            "--max-length": str(job.train.max_length),
            "--beta": beta and str(beta),
        }
    words = [word for pair in options.items() if pair[1] for word in pair]
    for role, column in (source.fields or {}).items() if not tasks else ():
        words += ["--field", f"{role}={column}"]
    return shlex.join(map(str, words))
