"""`loraloom data`: what a run's jobs learn from, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.options import RunFileArgument, SetOption
from loraloom.config.faults import suggestion
from loraloom.config.loading import load_run_config
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.config.data import SourceConfig
    from loraloom.config.job import JobConfig
    from loraloom.config.run import RunConfig
    from loraloom.data.encoding import EncodedRow

WIDTH = 80


def show(
    run_file: RunFileArgument,
    overrides: SetOption = None,
    job: Annotated[
        str | None, typer.Option("--job", metavar="NAME", help="Of one job alone.")
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Rows of each source, from its beginning.")
    ] = 2,
) -> None:
    """Print the first rows of jobs as tokens, with ^ under those that are learnt."""
    from loraloom.models.loading import load_tokenizer
    from loraloom.terminal import make_console

    run = load_run_config(run_file, overrides or ())
    jobs = _find_jobs(run, job)
    tokenizer = load_tokenizer(run.base_model)
    console = make_console(soft_wrap=True)
    console.print("Tokens between |, ^ under those that are learnt.")
    for config in jobs:
        for source in config.data.sources:
            for line in _show_source(config, source, tokenizer, rows):
                console.print(line, style="bold green" if line.lstrip(" ^") == "" else None)


def _find_jobs(run: RunConfig, name: str | None) -> list[JobConfig]:
    jobs = [job for job in run.all_jobs if name in (None, job.name)]
    if not jobs:
        names = [job.name for job in run.all_jobs]
        raise ConfigError(
            f"{suggestion(name or '', names)}--job must be one of {', '.join(names[:20])}, got "
            f"{name!r}"
        )
    return jobs


def _show_source(
    job: JobConfig, config: SourceConfig, tokenizer: PreTrainedTokenizerBase, limit: int
) -> Iterator[str]:
    from loraloom.data.sources import load_source

    source = load_source(
        config,
        tokenizer,
        job.train.max_length,
        "train",
        as_pairs=job.train.learns_from_pairs,
        limit=limit,
        streaming=job.data.streaming,
    )
    for number, row in enumerate(source.rows, start=1):
        yield from _show_row(f"{job.name}: {source.name}, row {number}", row, tokenizer)


def _show_row(name: str, row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    from loraloom.data.display import token_lines

    if not row.pieces:
        yield f"\n{name}: dropped, its answer does not fit max_length"
    for number, piece in enumerate(row.pieces, start=1):
        part = f", text {number} of {len(row.pieces)}" if len(row.pieces) > 1 else ""
        learnt = sum(piece.is_learnt)
        yield f"\n{name}{part}: {len(piece.input_ids)} tokens, {learnt} learnt"
        yield from token_lines(tokenizer, piece.input_ids, piece.is_learnt, WIDTH)


SUBCOMMANDS = {"show": show}
