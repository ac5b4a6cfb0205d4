"""`loraloom init`: a run file to start from, for a file of rows."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators
from rich.console import Console

from loraloom.atomic_io import prepare_output, write_output
from loraloom.base.loading import load_tokenizer
from loraloom.cli.data import row_lines
from loraloom.config.data import DataFormat, SourceConfig
from loraloom.config.fields import checked
from loraloom.config.text import local_path, read_settings, read_text, to_yaml
from loraloom.data.chat import are_messages
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import (
    HubSource,
    Row,
    RowStream,
    check_faults,
    fields_of,
    fields_of_all,
    find_location,
)
from loraloom.data.templates import HERMES, accepts_hermes, compile_template, render
from loraloom.data.tokens import EncodedRow
from loraloom.errors import ConfigError, DataError, plain
from loraloom.terminal import make_console, show_progress

# one comes before those whose columns its rows may have as well
ROW_FORMATS = ("preference", "chat", "choices", "instruction", "text")

_OPTIONAL = {"prompt", "tools", "system", "input", "chat_template_kwargs"}
# Columns that count even if few rows have them.
_RARE = {"tools", "system", "input", "context", "chat_template_kwargs"}
_FIRST_ROWS = 1000  # which show the columns
_TEMPLATE_ROWS = 100  # which show whether a chat template drops tools
_MAX_LENGTH = 2048
_COUNTED_ROWS = 1000  # at most, whose tokens' experts are counted
_ADVICE = "Name the format with --format, and the columns of its roles with --column ROLE=COLUMN"


def init(
    file: Path,
    /,
    *,
    base_model: str = "smollm2-135m",
    row_format: Annotated[DataFormat | None, Parameter(name="--format")] = None,
    column: tuple[str, ...] = (),
    chat_template: str | None = None,
    on_empty: Literal["error", "skip"] | None = None,
    expert_share: Annotated[
        float | None, Parameter(validator=validators.Number(gt=0, lte=1))
    ] = None,
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
        chat_template: Jinja text or file for conversations, or hermes for ChatML with tools.
            Default: the base model's chat template, or hermes if that drops tools.
        on_empty: Skip rows with an empty answer, or report an error (the default).
        expert_share: Adapt the experts of a mixture-of-experts base model, and only those that
            compute this share of the rows' tokens in each layer: 0.5, for example. The base model
            reads up to 1,000 rows to count them.
        output: Run file to write.
        overwrite: Replace a run file that exists.
    """
    prepare_output(output, "--output")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists. Pass --overwrite to replace it, or --output FILE.")
    if local_path(file, "FILE", DataError).is_dir():
        raise ConfigError(f"FILE must be a file, got the directory {file}; name a file inside")
    console = make_console(soft_wrap=True)
    rows = first_rows(file)
    row_format, columns = _choose_columns(console, file, rows, row_format, column)
    console.print(plain(f"base model: {base_model}"))
    name = re.sub(r"[^A-Za-z0-9]+", "-", file.name.partition(".")[0])
    name = name.strip("-")[:80] or "job"
    data = {"dataset": str(file), "format": row_format, **column_settings(columns)}
    data |= {"chat_template": chat_template, "on_empty": on_empty}
    data = {key: value for key, value in data.items() if value}
    tokenizer = load_tokenizer(base_model)
    max_length = min(_MAX_LENGTH, tokenizer.model_max_length)
    encoder = SourceEncoder(checked(SourceConfig, data), tokenizer, max_length)
    encoder = _replace_template(console, encoder, rows)
    data |= encoder.config.model_dump(include={"chat_template"}, exclude_none=True)
    encoded = encoder.load("train")
    sizes = _measure(encoded, encoder.max_length)
    targets = {}
    if expert_share is not None:
        targets = _busiest_experts(console, base_model, encoded, expert_share)
    fields = {"format": row_format, "targets": targets, **sizes}
    write_output(output, _run_file(base_model, name, data, fields))
    _print_summary(console, encoder, encoded, sizes["summary"])
    path = shlex.quote(str(output))
    console.print(f"wrote {output}\n\nNext:\n  loraloom data show {path}\n  loraloom train {path}")


def _choose_columns(
    console: Console,
    file: Path,
    rows: Sequence[Row],
    row_format: DataFormat | None,
    texts: Sequence[str],
) -> tuple[DataFormat, dict[str, str]]:
    pairs = [text.partition("=") for text in texts]
    fields = {role: name for role, _, name in pairs}
    if not all(fields.values()):
        raise ConfigError(f"--column must be ROLE=COLUMN, got {', '.join(texts)}")
    formats = [row_format] if row_format else ROW_FORMATS
    row_format, columns = find_columns(file, rows, formats, fields, _ADVICE)
    used = ", ".join(f"{name} ({role})" for role, name in columns.items())
    unused = ", ".join(sorted({*chain.from_iterable(rows)} - {*columns.values()}))
    console.print(plain(f"{file}: format {row_format}"))
    console.print(plain(f"columns: {used}"))
    console.print(plain(f"not used: {unused or 'none'}"))
    return row_format, columns


def _replace_template(
    console: Console, encoder: SourceEncoder, rows: Sequence[Row]
) -> SourceEncoder:
    """Use `hermes` in place of a chat template that drops the tools of rows."""
    config = encoder.config
    is_chat = config.format in ("chat", "preference")
    if not is_chat or config.chat_template is not None or not accepts_hermes(encoder.tokenizer):
        return encoder
    first = fields_of_all(rows)
    with_tools_first = sorted(rows, key=lambda row: not row.get(config.columns["tools"]))
    sample = with_tools_first[:_TEMPLATE_ROWS]
    encoded = encoder.encode(sample, first)
    if not any(row.drops_tools for row in encoded):
        return encoder
    candidate = replace(encoder, config=config.model_copy(update={"chat_template": HERMES}))
    for row, other in zip(encoded, candidate.encode(sample, first), strict=True):
        if other.fault not in (None, row.fault):
            return encoder  # it drops something else
    console.print(f"chat template: {HERMES}, because the base model's drops tools")
    return candidate


def _busiest_experts(
    console: Console, base_model: str, rows: Sequence[EncodedRow], share: float
) -> dict[str, str]:
    """Write the settings that adapt the experts which compute a share of the rows' tokens."""
    # 2 s of imports, which nothing else of this command needs
    from loraloom.base.loading import load_base_model
    from loraloom.host.expert_choices import busiest_experts, count_choices
    from loraloom.host.host import attach

    pieces = [piece.input_ids for row in rows for piece in row.pieces]
    pieces = pieces[:: math.ceil(len(pieces) / _COUNTED_ROWS)]
    model, _ = load_base_model(base_model, device="auto")
    host = attach(model)
    sizes = [len(ids) for ids in pieces]
    with show_progress(make_console(stderr=True), "counting experts", sizes) as advance:
        counts = count_choices(host, pieces, advance)
    chosen = busiest_experts(counts, share)
    num_chosen = sum(map(len, chosen.values()))
    total = sum(map(len, counts.values()))
    console.print(
        f"experts: {num_chosen} of {total} compute {share:.0%} of the tokens in each layer"
    )
    return {"target_modules": "[attention, experts]", "base_experts": str(chosen)}


def _print_summary(
    console: Console, encoder: SourceEncoder, rows: Sequence[EncodedRow], summary: str
) -> None:
    for number, row in enumerate(rows, start=1):
        if row.pieces:
            lines = row_lines(f"row {number}", row, encoder.tokenizer)
            console.print(*islice(lines, 100), sep="\n")
            break
    notes = "; ".join([summary, *encoder.notes(rows)])
    console.print(plain(f"\n{notes}"))


def _measure(rows: Sequence[EncodedRow], max_length: int) -> dict[str, Any]:
    learned = [row.pieces for row in rows if row.pieces]
    distinct = set(learned)
    lengths = [len(piece.input_ids) for pieces in learned for piece in pieces]
    longest = max(lengths)
    middle = f"{median(lengths):.0f}"
    summary = f"{len(rows)} rows of {min(lengths)} to {longest} tokens, {middle} in the median"
    num_repeats = len(learned) - len(distinct)
    if num_repeats:
        summary += f"; {num_repeats} duplicate{'s' if num_repeats > 1 else ''}"
    num_examples = sum(map(len, distinct))
    if any(row.is_pair for row in rows):
        num_examples //= 2
    is_cut = any(row.is_cut for row in rows)
    power_of_two = 1 << (longest - 1).bit_length()
    return {
        "num_rows": len(rows),
        "num_distinct": len(distinct),
        "num_examples": num_examples,
        "longest": f"at least {longest}" if is_cut else longest,
        "median": middle,
        "max_length": min(max(power_of_two, 512), max_length),
        "summary": summary,
    }


def _run_file(base_model: str, name: str, data: dict[str, Any], fields: dict[str, Any]) -> str:
    file = Path(__file__).with_suffix(".yaml.jinja")
    template = compile_template(read_text(file), file.name)
    fields["base_model"] = to_yaml({"base_model": base_model}).strip()
    fields["job"] = to_yaml({"name": name}).strip()
    fields["data"] = to_yaml(data).strip()
    return render(template, {"name": name, **fields})


def first_rows(location: Path | HubSource, split: str = "train") -> list[Row]:
    stream = RowStream(location, split)
    rows = list(islice(stream.rows(), _FIRST_ROWS))
    readable = [row for row in rows if not row.fault]
    if not readable:
        check_faults({row.origin: row.fault for row in rows if row.fault}, len(rows))
    return readable


def find_columns(
    file: object, rows: Sequence[Row], names: Sequence[str], fields: Mapping[str, str], advice: str
) -> tuple[DataFormat, dict[str, str]]:
    """Find the first of the named formats whose columns most rows have."""
    counts = Counter(chain.from_iterable(rows))
    usual: dict[str, str] = {}
    for name, count in counts.items():
        if 2 * count >= len(rows) or name in _RARE:
            usual[name.strip().lower()] = name
    formats: dict[Any, Any] = read_settings(Path(__file__).with_suffix(".columns.yaml"), "formats")
    row_formats: list[Any] = [name for name in names if name in formats]
    forms = [(name, roles) for name in row_formats for roles in formats[name]]
    for row_format, roles in forms:
        columns = _match_roles(roles, usual, fields)
        if not roles.keys() - _OPTIONAL <= columns.keys() <= roles.keys():
            continue
        if "completion" in roles and not _has_messages(rows, columns["completion"]):
            continue
        if row_format == "choices":
            raise ConfigError(
                f"{file} has choices. Name a task, or write a task file: see docs/result_files.md"
            )
        return row_format, columns
    required = [f"\n  {name}: {', '.join(roles)}" for name, roles in forms]
    raise DataError(
        f"{file}: no format fits the columns {fields_of(counts)}. {advice}. The roles of each "
        f"format ({', '.join(sorted(_OPTIONAL))} are optional):{''.join(required)}"
    )


def _match_roles(
    roles: Mapping[str, Sequence[str]], usual: Mapping[str, str], fields: Mapping[str, str]
) -> dict[str, str]:
    columns = {**fields}
    for role, names in roles.items():
        matches = [usual[name] for name in names if name in usual]
        free = [name for name in matches if name not in columns.values()]
        if free and role not in fields:
            columns[role] = free[0]
    return columns


def _has_messages(rows: Sequence[Row], column: str) -> bool:
    return are_messages(next((row[column] for row in rows if row.get(column)), None))


def infer_source(
    source: Mapping[str, Any], split: str, formats: Sequence[str] = ROW_FORMATS
) -> dict[str, Any]:
    """Add to a data set's settings its format, the first of these that fits its columns."""
    data = source["dataset"]
    rows = first_rows(find_location(data, split, source.get("config")), split)
    fields = source.get("fields") or {}
    advice = "Rename the columns, or name a task"
    row_format, columns = find_columns(data, rows, formats, fields, advice)
    settings = column_settings(columns)
    return {"format": row_format, **settings, **source, "fields": settings["fields"]}


def column_settings(columns: Mapping[str, str]) -> dict[str, Any]:
    template = None
    if "instruction" in columns:
        template = "plain"
        if columns["instruction"] == "instruction":
            template = "alpaca"
    fields = {role: name for role, name in columns.items() if role != name}
    return {"template": template, "fields": fields}
