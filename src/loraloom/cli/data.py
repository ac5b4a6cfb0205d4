"""`loraloom data`: what a run's jobs learn from: faults, counts, and rows token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field
from rich.cells import cell_len, chop_cells
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
from loraloom.training.settings import JobConfig, RunConfig, load_run_config

WIDTH = 80


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
    jobs = _find_jobs(run, options.job)
    tokenizer = load_tokenizer(run.base_model)
    console = make_console(soft_wrap=True)
    console.print("Tokens between |, ^ under those that are learnt.")
    table = make_table(
        "source", values=["rows", "empty", "cut", "dropped", "duplicates", "with tools", "faulty"]
    )
    faults: dict[str, None] = {}
    for config in jobs:
        held_out = () if config.data.validation is None else (config.data.validation,)
        for number, source in enumerate((*config.data.sources, *held_out)):
            split = "train" if number < len(config.data.sources) else "validation"
            fault = _check_source(
                config, source, split, tokenizer, options.rows, console.print, table
            )
            faults |= {fault: None} if fault else {}
    console.print()
    print_tables(make_console(), [table])
    if faults:
        raise DataError("\n".join(faults))


def _fill_in(settings: dict[str, Any]) -> dict[str, Any]:
    """Give a run file what data does not depend on, where it lacks that."""
    jobs = settings.get("jobs")
    if isinstance(jobs, list) and all(isinstance(job, dict) for job in jobs):
        adapter = {"method": CONFIGS[0].model_fields["method"].default}
        settings["jobs"] = [
            {"name": f"job{n}", "adapter": adapter, "train": _some_training(job), **job}
            for n, job in enumerate(jobs, start=1)
        ]
    return {"output_dir": "out", **settings}


def _some_training(job: dict[str, Any]) -> dict[str, Any]:
    learns_pairs = "preference" in str(job.get("data"))
    return {"max_steps": 1, **({"objective": {"name": "dpo"}} if learns_pairs else {})}


def _find_jobs(run: RunConfig, name: str | None) -> list[JobConfig]:
    jobs = [job for job in run.all_jobs if name in (None, job.name)]
    if not jobs:
        names = [job.name for job in run.all_jobs]
        raise ConfigError(
            f"{suggestion(name or '', names)}--job must be one of {', '.join(names[:20])}, got "
            f"{name!r}"
        )
    return jobs


def _check_source(
    job: JobConfig,
    config: SourceConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    num_shown: int,
    print_line: Any,
    table: Table,
) -> str:
    """Print a source's first rows and add its counts to the table; what is wrong with its rows."""
    streaming = job.data.streaming and split == "train"
    train = job.train
    encoder = SourceEncoder(config, tokenizer, train.max_length, train.learns_from_pairs)
    try:
        limit = num_shown if streaming else None
        rows, source = encoder.read(split, limit, streaming=streaming)
    except DataError as error:  # the file as a whole
        return str(error)
    for number, row in enumerate(source.rows[:num_shown], start=1):
        for line in _show_row(f"{job.name}: {source.name}, row {number}", row, tokenizer):
            print_line(line, style="bold green" if line.lstrip(" ^") == "" else None)
    tools = (config.fields or {}).get("tools", "tools")
    counts = _count(rows, source.rows, tools)
    table.add_row(f"{job.name}: {Path(source.name).name}", *map(str, counts))
    try:
        encoder.check(rows, source.rows)
    except DataError as error:
        return str(error)
    return ""


def _count(rows: list[Row], encoded: list[EncodedRow], tools: str) -> tuple[int, ...]:
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
        shown = token_text(tokenizer, token)
        for part in chop_cells(shown, width - 1) or [""]:
            if cell_len(text) + cell_len(part) + 1 > width:
                yield from _lines(text, marks)
                text, marks = "", ""
            text += f"{part}|"
            marks += ("^" if is_marked else " ") * cell_len(part) + " "
        if "\\n" in shown:
            yield from _lines(text, marks)
            text, marks = "", ""
    yield from _lines(text, marks)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What stands for a token in a text, with escapes in place of what can't be seen."""
    return plain(text_of_token(tokenizer, token).replace("\n", "\\n"))


def _lines(text: str, marks: str) -> Iterator[str]:
    if text:
        yield text
    if marks.strip():
        yield marks.rstrip()
