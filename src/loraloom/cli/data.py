"""`loraloom data`: what a run's jobs learn from: faults, counts, and rows token by token."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators
from rich.cells import cell_len
from transformers import PreTrainedTokenizerBase

from loraloom.base.loading import load_tokenizer
from loraloom.cli.options import Sets
from loraloom.config.data import SourceConfig
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import Row
from loraloom.data.tokens import EncodedRow, count_labels, text_of_token
from loraloom.errors import DataError, plain
from loraloom.terminal import make_console, make_table, print_tables
from loraloom.training.settings import load_run_config

WIDTH = 80
COUNTS = ["rows", "empty", "cut", "dropped", "duplicates", "with tools", "faulty"]


def show(
    run_file: Path,
    /,
    *,
    overrides: Sets = (),
    rows: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 2,
) -> None:
    """Check and count all rows of a run file, and print the first as tokens, ^ under the loss.

    All unusable rows are listed at the end. For streams, only the first --rows rows are checked.

    Args:
        run_file: YAML file with a base model and jobs.
        rows: Print the first N rows of each source.
    """
    run = load_run_config(run_file, overrides)
    tokenizer = load_tokenizer(run.base_model)
    console = make_console(soft_wrap=True)
    console.print("Tokens are separated by |; ^ marks tokens in the loss.")
    table = make_table("source", values=COUNTS)
    faults: list[str] = []
    for job in run.all_jobs:
        as_pairs = job.train.objective.learns_from_pairs
        splits = [(source, "train") for source in job.data.sources]
        if job.data.validation is not None:
            splits.append((job.data.validation, "validation"))
        for source, split in splits:
            encoder = SourceEncoder(source, tokenizer, job.train.max_length, as_pairs)
            is_streamed = job.data.streaming and split == "train"
            limit = rows if is_streamed else None
            try:
                read, encoded = encoder.read(split, limit)
                name = f"{job.name}: {encoder.name}"
                for number, row in enumerate(encoded[:rows], start=1):
                    for line in row_lines(f"{name}, row {number}", row, tokenizer):
                        console.print(line, style="" if line.strip(" ^") else "bold green")
                counts = _count(read, encoded, source)
                table.add_row(f"{job.name}: {Path(encoder.name).name}", *counts)
                encoder.check(read, encoded)
            except DataError as error:
                faults.append(str(error))
    console.print()
    print_tables(console, [table])
    if faults:
        raise DataError("\n".join(dict.fromkeys(faults)))


def _count(rows: Sequence[Row], encoded: Sequence[EncodedRow], source: SourceConfig) -> list[str]:
    # in the order of COUNTS
    num_empty = sum(row.is_empty for row in encoded)
    num_faulty = sum(bool(row.fault) for row in encoded) - num_empty
    learned = [row.pieces for row in encoded if row.pieces]
    column = (source.fields or {}).get("tools", "tools")
    num_dropped = len(encoded) - len(learned) - num_empty - num_faulty
    counts = [
        len(encoded),
        num_empty,
        sum(row.is_cut for row in encoded),
        num_dropped,
        len(learned) - len(set(learned)),
        sum(bool(row.get(column)) for row in rows),
        num_faulty,
    ]
    return [str(count) for count in counts]


def row_lines(name: str, row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Lines of a row: its sizes, its tokens, and `^` under those that are learned."""
    if not row.pieces:
        reason = "dropped, because the answer exceeds max_length"
        if row.fault is not None:
            reason = row.fault.reason
        yield f"\n{name}: {reason}"
    num_pieces = len(row.pieces)
    for number, piece in enumerate(row.pieces, start=1):
        title = f"{name}, text {number} of {num_pieces}" if num_pieces > 1 else name
        num_learned = count_labels(piece)
        yield f"\n{title}: {len(piece.input_ids)} tokens, {num_learned} in the loss"
        yield from token_lines(tokenizer, piece.input_ids, piece.is_learnt, WIDTH)


def token_lines(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marked: Sequence[bool], width: int
) -> Iterator[str]:
    """Lines of tokens, `|` between them; after each that has marked ones, a line of `^`."""
    lines = ["", ""]
    for token, is_marked in zip(ids, marked, strict=True):
        # escapes stand in place of what can't be seen
        text = plain(text_of_token(tokenizer, token).replace("\n", "\\n"))
        size = cell_len(text)
        if cell_len(lines[-2]) + size >= width:
            lines += ["", ""]
        mark = "^" if is_marked else " "
        lines[-2] += f"{text}|"
        lines[-1] += f"{mark * size} "
        if "\\n" in text:
            lines += ["", ""]
    yield from filter(None, map(str.rstrip, lines))
