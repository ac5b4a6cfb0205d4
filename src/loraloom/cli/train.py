"""`loraloom train`: from a run file to trained adapters, and what to type next."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from loraloom.cli.options import BASE, Sets
from loraloom.config.fields import StrictModel
from loraloom.errors import ConfigError, TrainingError
from loraloom.terminal import make_console, make_table, print_tables, show_bytes
from loraloom.training import run as training
from loraloom.training.job import JobResult
from loraloom.training.memory import predict_memory
from loraloom.training.reporting import Progress
from loraloom.training.settings import RunConfig, load_run_config
from loraloom.training.watched_directory import WatchOptions

MAX_ADAPTERS = 8
CARDS_GB = (24, 48, 80)
USABLE_SHARE = 0.95  # the rest is the driver's, libraries' and fragmentation's


class TrainOptions(StrictModel):
    """What becomes of earlier results, and where else jobs come from."""

    dry_run: bool = False
    """Print the memory that the run will need, from the base model's configuration, and exit."""
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
        if self.dry_run and (self.resume or self.overwrite or self.watch or self.ray):
            yield "--dry-run trains nothing; remove --resume, --overwrite, --watch and --ray"


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
    console = make_console(quiet=training.read_launch().rank > 0)
    run = load_run_config(run_file, overrides)
    if options.dry_run:
        return _print_memory(run, run_file, overrides, console)
    watch = None
    if options.watch is not None:
        watch = WatchOptions(options.watch, options.overwrite, options.watch_exit_when_idle)
    results = training.train(
        run,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=Progress(console),
        watch=watch,
        ray=options.ray,
        ray_workers=options.ray_workers,
        command=shlex.join(["loraloom", *sys.argv[1:]]),
    )
    if results and run.sweep is None:  # which prints its ranking
        print_tables(console, [_results_table(results)])
    command = generate_command(run, results)
    if command is not None:
        console.print(f"\nGenerate with:\n  {command}", soft_wrap=True)
    raise_failures(results)


def _print_memory(run: RunConfig, run_file: Path, overrides: Sets, console: Console) -> None:
    """Print the memory of a run, and the peaks of changed settings if a card is too small."""
    memory = predict_memory(run)
    for name, kept in memory.jobs.items():
        console.print(f"{name}: {kept}", soft_wrap=True)
    console.print()
    parts = make_table("memory", values=["size"])
    for name, num_bytes in memory.parts.items():
        parts.add_row(name, show_bytes(num_bytes))
    cards = make_table("settings", values=["peak", *(f"{card} GB" for card in CARDS_GB)])
    fits = _fits(memory.peak_bytes)
    cards.add_row("as they are", *fits)
    if "-" in fits:
        for name, changes in _saving_changes(run).items():
            with suppress(ConfigError):  # of a method that needs more ranks
                smaller = load_run_config(run_file, [*overrides, *changes])
                peak_bytes = predict_memory(smaller).peak_bytes
                if peak_bytes < memory.peak_bytes:
                    cards.add_row(name, *_fits(peak_bytes))
    print_tables(console, [parts, cards])


def _fits(peak_bytes: int) -> list[str]:
    fits = ["fits" if peak_bytes <= USABLE_SHARE * card * 1e9 else "-" for card in CARDS_GB]
    return [show_bytes(peak_bytes), *fits]


def _saving_changes(run: RunConfig) -> dict[str, list[str]]:
    """Name changes that save memory, as overrides of the run file."""
    jobs = [f"jobs.{index}" for index, _ in enumerate(run.jobs)]
    halves = [max(1, job.adapter.rank // 2) for job in run.jobs]
    ranks = zip(jobs, halves, strict=True)
    changes = {
        "gradient_checkpointing": [f"{job}.train.gradient_checkpointing=true" for job in jobs],
        "micro_batch_size: 1": [f"{job}.train.micro_batch_size=1" for job in jobs],
        "half of the rank": [f"{job}.adapter.rank={rank}" for job, rank in ranks],
        "quantization: nf4": ["quantization=nf4"],
    }
    return {**changes, "all of these": list(chain.from_iterable(changes.values()))}


def _results_table(results: Sequence[JobResult]) -> Table:
    metrics = list(dict.fromkeys(chain.from_iterable(result.metrics for result in results)))
    table = make_table("job", values=["method", "steps", "status", "weights", *metrics])
    for result in results:
        texts = [result.method, str(result.steps), result.status, result.weights]
        for name in metrics:
            value = result.metrics.get(name)
            texts.append("-" if value is None else f"{value:.4f}")
        table.add_row(result.job, *texts)
    return table


def raise_failures(results: Sequence[JobResult]) -> None:
    """Raise a TrainingError that names every job that failed."""
    failures = [result.error for result in results if result.error is not None]
    if failures:
        raise TrainingError("\n".join(failures))


def generate_command(run: RunConfig, results: Sequence[JobResult]) -> str | None:
    """Write a command that asks what was trained; None where nothing was."""
    good = [result for result in results if result.error is None and result.status != "stopped"]
    if not good:
        return None
    options = [("--base-model", run.base_model)]
    if run.quantization is not None:
        options.append(("--quantization", run.quantization))
    for result in good[:MAX_ADAPTERS]:
        name = result.job if result.job != BASE else f"{BASE}-adapter"
        options.append(("--adapter", f"{name}={result.directory}"))
    options.append(("--prompt", "Hello!"))
    return " \\\n    ".join(["loraloom generate", *map(shlex.join, options)])
