"""`loraloom train`: from a run file to trained adapters."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.options import (
    RayOption,
    RayWorkersOption,
    RunFileArgument,
    SetOption,
    check_ray_workers,
    path_option,
)
from loraloom.config.fields import AttnImplementation, BaseDtype
from loraloom.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from rich.table import Table

    from loraloom.training.run.results import JobResult


def train(
    run_file: RunFileArgument,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier results of these jobs.")
    ] = False,
    watch: Annotated[
        Path | None,
        path_option(
            "--watch",
            metavar="DIR",
            help="Go on, and train the job files that come into this directory too.",
        ),
    ] = None,
    watch_exit_when_idle: Annotated[
        bool,
        typer.Option("--watch-exit-when-idle", help="With --watch: end when all files are done."),
    ] = False,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    dtype: Annotated[
        BaseDtype | None, typer.Option("--dtype", help="In place of the run file's dtype.")
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", metavar="KIND", help="In place of the run file's."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="In place of the run file's device."),
    ] = None,
    attn_implementation: Annotated[
        AttnImplementation | None,
        typer.Option("--attn-implementation", help="In place of the run file's."),
    ] = None,
) -> None:
    """Train the adapters of a run file, all of them together on one base model.

    With `torchrun --nproc-per-node N -m loraloom train RUN.yaml`, N processes share the rows.

    Ctrl-C, SIGTERM or SIGHUP saves everything for --resume; a second one ends at once. Output
    that can't be written, to a closed pipe say, is lost; training goes on.
    """
    options = {
        "dtype": dtype,
        "quantization": quantization,
        "device": device,
        "attn_implementation": attn_implementation,
    }
    changes = [f"{name}={value}" for name, value in options.items() if value is not None]
    if watch_exit_when_idle and watch is None:
        raise ConfigError("--watch-exit-when-idle has no effect without --watch DIR; give it")
    check_ray_workers(ray, ray_workers)
    from loraloom.config.loading import load_run_config

    run = load_run_config(run_file, [*(overrides or ()), *changes], needs_jobs=watch is None)
    from loraloom.cli.evaluation_command import evaluation_command, generation_command
    from loraloom.terminal import make_console, print_tables
    from loraloom.training.run import run as training
    from loraloom.training.run.inbox import WatchOptions
    from loraloom.training.run.launch import read_launch
    from loraloom.training.run.progress import Progress

    console = make_console(quiet=read_launch().rank > 0)
    results = training.train(
        run,
        resume=resume,
        overwrite=overwrite,
        progress=Progress(console),
        watch=watch and WatchOptions(watch, overwrite, watch_exit_when_idle),
        ray=ray,
        ray_workers=ray_workers,
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
    from loraloom.terminal import make_table

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
