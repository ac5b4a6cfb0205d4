"""`loraloom data`: what a run's jobs learn from: faults, counts, and rows token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from loraloom.adapters import CONFIGS
from loraloom.cli.options import LocalPath, Sets
from loraloom.config.data import SourceConfig
from loraloom.config.fields import StrictModel, suggestion
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import Row
from loraloom.data.tokens import EncodedRow, text_of_token
from loraloom.errors import ConfigError, DataError, plain
from loraloom.models.loading import load_tokenizer
from loraloom.terminal import make_console, make_table, print_tables
from loraloom.training.settings import JobConfig, load_run_config

WIDTH = 80
COUNTS = ["rows", "empty", "cut", "dropped", "duplicates", "with tools", "faulty"]


class ShowOptions(StrictModel):
    """Which rows are shown."""

    job: str | None = None
    """Check and show one job only."""
    rows: int = Field(default=2, ge=1)
    """Print N rows of each source, from its beginning."""


def show(
    run_file: LocalPath,
    /,
    *,
    overrides: Sets | None = None,
    options: Annotated[ShowOptions, Parameter(name="*")] = ShowOptions(),
) -> None:
    """Check all rows of jobs, count them, and print the first as tokens, ^ under those learnt.

    The run file needs a base_model, for its tokenizer, and the jobs' data. Rows that can't be used
    are listed together at the end. Of streams, the first --rows rows are checked.

    Args:
        run_file: A base model and its jobs.
    """
    run = load_run_config(run_file, overrides or (), fill_in=_fill_in)
    names = [job.name for job in run.all_jobs]
    if options.job is not None and options.job not in names:
        raise ConfigError(
            f"{suggestion(options.job, names)}--job must be one of {', '.join(names[:20])}, got "
            f"{options.job!r}"
        )
    tokenizer = load_tokenizer(run.base_model)
    console = make_console(soft_wrap=True)
    console.print("Tokens between |, ^ under those that are learnt.")
    table = make_table("source", values=COUNTS)
    faults: list[str] = []
    for job in run.all_jobs:
        if options.job in (None, job.name):
            splits = [(source, "train") for source in job.data.sources]
            splits += [(job.data.validation, "validation")] if job.data.validation else []
            for source, split in splits:
                try:
                    _check_source(job, source, split, tokenizer, options.rows, console, table)
                except DataError as error:
                    faults.append(str(error))
    console.print()
    print_tables(make_console(), [table])
    if faults:
        raise DataError("\n".join(dict.fromkeys(faults)))


def _fill_in(settings: dict[str, Any]) -> dict[str, Any]:
    # what data does not depend on: a run file may be checked before it has methods and rates
    jobs = settings.get("jobs")
    if isinstance(jobs, list) and all(isinstance(job, dict) for job in jobs):
        adapter = {"method": CONFIGS[0].model_fields["method"].default}
        for number, job in enumerate(jobs):
            has_pairs = "preference" in str(job.get("data"))
            train = {"max_steps": 1, **({"objective": {"name": "dpo"}} if has_pairs else {})}
            jobs[number] = {"name": f"job{number + 1}", "adapter": adapter, "train": train, **job}
    return {"output_dir": "out", **settings}


def _check_source(
    job: JobConfig,
    config: SourceConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    num_shown: int,
    console: Console,
    table: Table,
) -> None:
    """Print a source's first rows and add its counts to the table."""
    train, streaming = job.train, job.data.streaming and split == "train"
    encoder = SourceEncoder(config, tokenizer, train.max_length, train.learns_from_pairs)
    rows, encoded = encoder.read(split, num_shown if streaming else None, streaming=streaming)
    for number, row in enumerate(encoded[:num_shown], start=1):
        for line in _show_row(f"{job.name}: {encoder.name}, row {number}", row, tokenizer):
            console.print(line, style="bold green" if line.lstrip(" ^") == "" else None)
    tools = (config.fields or {}).get("tools", "tools")
    counts = _count(rows, encoded, tools)
    table.add_row(f"{job.name}: {Path(encoder.name).name}", *map(str, counts))
    encoder.check(rows, encoded)


def _count(rows: Sequence[Row], encoded: Sequence[EncodedRow], tools: str) -> tuple[int, ...]:
    # in the order of COUNTS; rows with the same tokens count as duplicates, whatever they say
    learnt = [tuple(piece.input_ids for piece in row.pieces) for row in encoded if row.pieces]
    empty = sum(row.is_empty for row in encoded)
    faulty = sum(bool(row.fault) for row in encoded) - empty
    return (
        len(rows),
        empty,
        sum(row.is_cut for row in encoded),
        len(rows) - len(learnt) - empty - faulty,
        len(learnt) - len(set(learnt)),
        sum(bool(row.get(tools)) for row in rows),
        faulty,
    )


def _show_row(name: str, row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if not row.pieces:
        yield f"\n{name}: {row.fault or 'dropped, its answer does not fit max_length'}"
    for number, piece in enumerate(row.pieces, start=1):
        part = f", text {number} of {len(row.pieces)}" if len(row.pieces) > 1 else ""
        learnt = sum(piece.is_learnt)
        yield f"\n{name}{part}: {len(piece.input_ids)} tokens, {learnt} learnt"
        yield from token_lines(tokenizer, piece.input_ids, piece.is_learnt, WIDTH)


def token_lines(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marked: Sequence[bool], width: int
) -> Iterator[str]:
    """Lines of tokens, `|` between them; after each that has marked ones, a line of `^`."""
    text, marks = "", ""
    for token, is_marked in zip(ids, marked, strict=True):
        # escapes stand in place of what can't be seen
        shown = plain(text_of_token(tokenizer, token).replace("\n", "\\n"))
        for part in chop_cells(shown, width - 1) or [""]:
            if cell_len(text) + cell_len(part) + 1 > width:
                yield from filter(None, (text, marks.rstrip()))
                text, marks = "", ""
            text += f"{part}|"
            marks += ("^" if is_marked else " ") * cell_len(part) + " "
        if "\\n" in shown:
            yield from filter(None, (text, marks.rstrip()))
            text, marks = "", ""
    yield from filter(None, (text, marks.rstrip()))
