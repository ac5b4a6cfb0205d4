"""`loraloom train`: from a run file to trained adapters."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from loraloom.cli.options import LocalPath, RayOptions, Sets
from loraloom.config.fields import StrictModel
from loraloom.config.model import AttnImplementation, BaseDtype
from loraloom.errors import ConfigError, TrainingError
from loraloom.terminal import make_console, make_table, print_tables

if TYPE_CHECKING:
    from loraloom.training.results import JobResult


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
    from loraloom.cli.evaluation_command import evaluation_command, generation_command
    from loraloom.training import run as training
    from loraloom.training.inbox import WatchOptions
    from loraloom.training.parallel import read_launch
    from loraloom.training.progress import Progress
    from loraloom.training.settings import load_run_config

    changes = [f"{name}={value}" for name, value in model.model_dump(exclude_none=True).items()]
    if options.watch_exit_when_idle and options.watch is None:
        raise ConfigError("--watch-exit-when-idle has no effect without --watch DIR; give it")
    run = load_run_config(
        run_file, [*(overrides or ()), *changes], needs_jobs=options.watch is None
    )
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
    for purpose, command in (
        ("Evaluate", evaluation_command(run, results)),
        ("Generate", generation_command(run, results)),
    ):
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
