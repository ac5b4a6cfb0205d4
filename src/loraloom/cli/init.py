"""`loraloom init`: a run file to start from, for a file of rows."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from os.path import relpath
from pathlib import Path
from statistics import median
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from loraloom.atomic_io import prepare_output, write_output
from loraloom.base.loading import load_tokenizer
from loraloom.cli.data import row_lines
from loraloom.config.data import DataFormat, SourceConfig
from loraloom.config.fields import checked, suggestion
from loraloom.config.text import local_path, read_settings, read_text, to_yaml
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import HubSource, Row, RowStream, check_faults, fields_of
from loraloom.data.tasks import answer_options
from loraloom.data.templates import compile_template, render
from loraloom.data.tokens import EncodedRow
from loraloom.errors import ConfigError, DataError, plain
from loraloom.terminal import make_console

RowFormat = DataFormat | Literal["choices"]
# one comes before those whose columns its rows may have as well
ROW_FORMATS = ("preference", "chat", "choices", "instruction", "text")

_OPTIONAL = {"prompt", "tools", "system", "input"}
# Rows that show which columns there are; tokens of a row.
_FIRST_ROWS, _MAX_LENGTH = 1000, 2048
_ADVICE = "Name the format with --format, and the columns of its roles with --column ROLE=COLUMN"


def init(
    file: Path,
    /,
    *,
    base_model: str = "smollm2-135m",
    row_format: Annotated[RowFormat | None, Parameter(name="--format")] = None,
    column: tuple[str, ...] = (),
    chat_template: str | None = None,
    on_empty: Literal["error", "skip"] | None = None,
    output: Path = Path("run.yaml"),
    overwrite: bool = False,
) -> None:
    """Check all rows of a file as training reads them, and write a run file to start from.

    The format of the rows is inferred from the names of their columns. If some rows can't be used,
    they are listed together, and no run file is written.

    Args:
        file: Rows to learn from: .json, .jsonl, .csv, .txt or .parquet, plain or gzipped.
        base_model: Hub ID, directory or .gguf file of the base model.
        row_format: Format of the rows, if their columns have unusual names.
        column: Column of a role, ROLE=COLUMN: output=reply, for example. May be repeated.
        chat_template: Jinja text or file for conversations, if the base model has none.
        on_empty: Skip rows with an empty answer, or report an error (the default).
        output: Run file to write. For choice questions, a task's file joins it.
        overwrite: Replace files that exist.
    """
    named_columns = {role: name for role, _, name in (text.partition("=") for text in column)}
    if not all(named_columns.values()):
        raise ConfigError(f"--column must be ROLE=COLUMN, got {', '.join(column)}")
    prepare_output(output, "--output")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists. Pass --overwrite to replace it, or --output FILE.")
    if local_path(file, "FILE", DataError).is_dir():
        raise ConfigError(f"FILE must be a file, got the directory {file}; name a file inside")
    rows = first_rows(file)
    formats = [row_format] if row_format else ROW_FORMATS
    row_format, columns = find_columns(file, rows, formats, named_columns, _ADVICE)
    console = make_console(soft_wrap=True)
    used = ", ".join(f"{name} ({role})" for role, name in columns.items())
    unused = ", ".join(sorted({*chain.from_iterable(rows)} - {*columns.values()})) or "none"
    console.print(plain(f"{file}: format {row_format}\ncolumns: {used}\nnot used: {unused}"))
    console.print(plain(f"base model: {base_model}"))
    name = re.sub(r"[^A-Za-z0-9]+", "-", file.name.split(".")[0]).strip("-")[:80] or "job"
    task = output.with_name(f"{name}-task.yaml")
    task_text = ""
    data: dict[str, Any]
    if row_format == "choices":
        data = {"task": str(task), "path": str(file), "scoring": "text"}
        files = {"train": relpath(file, output.parent)}
        task_text = to_yaml({"data": {"files": files}, **_task_settings(rows, **columns)})
        if task.exists() and not overwrite and read_text(task) != task_text:
            raise ConfigError(f"{task} has other settings. Pass --overwrite to replace the file.")
    else:
        data = {"dataset": str(file), "format": row_format, **column_settings(columns)}
    data |= {"chat_template": chat_template, "on_empty": on_empty}
    data = {key: value for key, value in data.items() if value}
    tokenizer = load_tokenizer(base_model)
    max_length = min(_MAX_LENGTH, tokenizer.model_max_length)
    with TemporaryDirectory() as scratch:
        source = data
        if task_text:
            source = data | {"task": str(Path(scratch, task.name))}
            write_output(Path(scratch, task.name), task_text)
        encoder = SourceEncoder(checked(SourceConfig, source), tokenizer, max_length)
        encoded = encoder.load("train")
    sizes = _measure(encoded, max_length)
    settings = {"base_model": {"base_model": base_model}, "job": {"name": name}, "data": data}
    sizes |= {key: to_yaml(value).strip() for key, value in settings.items()}
    file = Path(__file__).with_suffix(".yaml.jinja")
    template = compile_template(read_text(file), file.name)
    if task_text:
        write_output(task, task_text)
    write_output(output, render(template, {"format": row_format, "name": name, **sizes}))
    number, first = next((n, row) for n, row in enumerate(encoded, start=1) if row.pieces)
    console.print(*islice(row_lines(f"row {number}", first, tokenizer), 100), sep="\n")
    notes = "; ".join([sizes["summary"], *encoder.notes(encoded)])
    console.print(plain(f"\n{notes}"))
    path = shlex.quote(str(output))
    console.print(f"wrote {output}\n\nNext:\n  loraloom data show {path}\n  loraloom train {path}")


def _measure(rows: Sequence[EncodedRow], max_length: int) -> dict[str, Any]:
    """The numbers of a run file, and a line that sums them up."""
    learned = [row.pieces for row in rows if row.pieces]
    distinct = {*learned}
    lengths = [len(piece.input_ids) for pieces in learned for piece in pieces]
    longest, middle = max(lengths), f"{median(lengths):.0f}"
    summary = f"{len(rows)} rows of {min(lengths)} to {longest} tokens, {middle} in the median"
    if repeats := len(learned) - len(distinct):
        summary += f"; {repeats} duplicate{'s' if repeats > 1 else ''}"
    return {
        "num_rows": len(rows),
        "num_distinct": len(distinct),
        "num_examples": sum(map(len, distinct)) // (2 if any(row.is_pair for row in rows) else 1),
        "longest": f"at least {longest}" if any(row.is_cut for row in rows) else str(longest),
        "median": middle,
        "max_length": min(max(1 << (longest - 1).bit_length(), 512), max_length),
        "summary": summary,
    }


def first_rows(location: Path | HubSource, split: str = "train") -> list[Row]:
    rows = list(islice(RowStream(location, split, streaming=False).rows(), _FIRST_ROWS))
    readable = [row for row in rows if not row.fault]
    if not readable:
        check_faults({row.origin: row.fault for row in rows}, len(rows))
    return readable


def find_columns(
    file: object, rows: Sequence[Row], names: Sequence[str], fields: dict[str, str], advice: str
) -> tuple[RowFormat, dict[str, str]]:
    """Find the first of the named formats whose columns most rows have."""
    counts = Counter(chain.from_iterable(rows))
    # an optional role's own column is read in the rows that have it
    rare = {"tools", "system", "input", "context"}
    lacking = [name for role, name in fields.items() if role not in rare and name not in counts]
    if lacking:
        hint = f"{suggestion(lacking[0], counts)}its columns are {fields_of(counts)}"
        raise DataError(f"{file} has no column {lacking[0]!r}, which --column names; {hint}")
    usual = [name for name in counts if 2 * counts[name] >= len(rows) or name in rare]
    formats: dict[Any, Any] = read_settings(Path(__file__).with_suffix(".columns.yaml"), "formats")
    row_formats: list[Any] = [name for name in names if name in formats]
    for row_format in row_formats:
        roles: dict[str, list[str]] = formats[row_format]
        columns = dict(fields)
        for role, candidates in roles.items():
            free = {name.strip().lower(): name for name in usual if name not in columns.values()}
            match = next((name for name in candidates if name in free), None)
            if match is not None and role not in fields:
                columns[role] = free[match]
        if roles.keys() - _OPTIONAL <= columns.keys() <= roles.keys():
            return row_format, columns
    required = (f"\n  {name}: {', '.join(formats[name])}" for name in row_formats)
    raise DataError(
        f"{file}: no format fits the columns {fields_of(counts)}. {advice}. The roles of each "
        f"format ({', '.join(sorted(_OPTIONAL))} are optional):{''.join(required)}"
    )


def infer_source(
    source: Mapping[str, Any], rows: Sequence[Row], formats: Sequence[str] = ROW_FORMATS
) -> dict[str, Any]:
    """Add to a data set's settings its format, the first of these that fits its columns."""
    data, fields = source["dataset"], dict(source.get("fields") or {})
    advice = "Rename the columns, or name a task"
    row_format, columns = find_columns(data, rows, formats, fields, advice)
    if row_format == "choices":
        raise ConfigError(f"{data} has choices. Name a task, or the task file that init writes.")
    settings = column_settings(columns)
    return {"format": row_format, **settings, **source, "fields": settings["fields"]}


def column_settings(columns: Mapping[str, str]) -> dict[str, Any]:
    templates = {None: None, "instruction": "alpaca"}
    fields = {role: name for role, name in columns.items() if role != name}
    return {"template": templates.get(columns.get("instruction"), "plain"), "fields": fields}


def _task_settings(rows: Sequence[Row], question: str, choices: str, answer: str) -> dict[str, Any]:
    """Make the settings of a task's file from all rows' questions, choices and answers."""
    if not question.isidentifier():
        raise ConfigError(
            f"question must be a name of letters, digits and _, got {question!r}. Rename the column"
        )
    settings = {"template": f"Question: {{{{ {question} }}}}\nAnswer:", "answer": answer}
    kinds: Counter[str] = Counter()
    for row in rows:
        if not {choices, answer} <= row.keys():
            continue
        # as in ARC: lists of texts and labels, or a list of objects with both
        first = row[choices]
        if isinstance(first, list) and first:
            first = first[0]
        if isinstance(first, Mapping):
            return {**settings, "choices": f"{choices}.text", "labels": f"{choices}.label"}
        kinds.update(_kinds_of_answer(row[choices], row[answer]))
    # the first where several fit all rows
    kind = max(("text", "index", "label"), key=kinds.__getitem__)
    return {**settings, "choices": choices, "answer_is": kind}


def _kinds_of_answer(choices: Any, right: Any) -> list[str]:
    if not isinstance(choices, list):
        return []
    options = answer_options([str(text) for text in choices], ascii_uppercase[: len(choices)])
    if not isinstance(right, str) and right not in choices:
        del options["text"]  # the number 1 is an index in a list of "1" and "2"
    answer = str(right).strip()
    return [kind for kind, names in options.items() if names.count(answer) == 1]
