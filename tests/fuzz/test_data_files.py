"""Data files of every kind and format, and templates, valid at first and then broken."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from loraloom.config.data import SourceConfig
from loraloom.data.encoding import SourceEncoder
from tests.conftest import build_tokenizer
from tests.fuzz.harness import broken_bytes, fuzz, mutated, survives

CALL = {"function": {"name": "color", "arguments": {"of": "sky"}}}
TOOL = {"type": "function", "function": {"name": "color", "parameters": {"type": "object"}}}
QUESTION = {"role": "user", "content": "color?"}
ANSWER = {"role": "assistant", "content": "blue"}
CHATS = [
    {"messages": [QUESTION, ANSWER, QUESTION, {**ANSWER, "reasoning_content": "hm"}]},
    {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ANSWER,
        ],
        "tools": [TOOL],
    },
    {"conversations": [{"from": "human", "value": "color?"}, {"from": "gpt", "value": "blue"}]},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "instruction": [{"instruction": "Say one.", "input": "", "output": "one"}] * 3,
    "chat": CHATS,
    "text": [{"text": "the sky is blue"}] * 3,
    "preference": [
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "green"}]}
    ],
    "arc_easy": [
        {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    ],
    "piqa": [{"goal": "go", "sol1": "left", "sol2": "right", "label": 1}],
    "boolq": [{"question": "is it", "passage": "It is.", "answer": True}],
    "winogrande": [{"sentence": "The _ is.", "option1": "a", "option2": "b", "answer": "1"}],
}
"""Rows of each format, and of some tasks."""

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.reasoning_content }}{{ m.content }}{{ m.tool_calls }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FRAGMENTS = [
    *("{% for i in range(99) %}", "{% endfor %}", "{{ 'x' * 10**3 }}", "{{ 1/0 }}", "{{"),
    *("{% macro a(n) %}", "{% endmacro %}", "{{ a(a(1)) }}", "{{ messages[0].content }}", "}}"),
    *("{{ instruction ~ instruction }}", "{{ 2 ** 10 }}", "{{ '%99d' % 1 }}", "{% raw %}"),
    *("{% set n = namespace(x='x') %}", "{{ n.x }}", "{% set x %}", "{{ [].__class__ }}"),
    *("{{ n.x in [n.x, [n.x]] }}", "{{ n.x|string }}", "{% generation %}", "{% endgeneration %}"),
    *("{{ raise_exception('no') }}", "{% include 'x' %}", "{{ '\\ud800' }}", "\0", "{# "),
]
"""The sandbox bounds neither time nor memory, so none of them grows in a loop."""


@contextmanager
def written(data: bytes, suffix: str) -> Iterator[Path]:
    """A file of these bytes in a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"train{suffix}"
        path.write_bytes(data)
        yield path


def load(path: Path, kind: str, **settings: Any) -> None:
    """Read and encode a file as training does."""
    if kind in ("instruction", "chat", "text", "preference"):
        config = SourceConfig(dataset=str(path), format=kind, **settings)
    else:
        config = SourceConfig(task=kind, path=str(path), scoring="text")
    SourceEncoder(config, _tokenizer(), 64).load("train")


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def as_json(rows: Any) -> bytes:
    return json.dumps(rows).encode()


def as_json_lines(rows: Any) -> bytes:
    return b"\n".join(map(as_json, _listed(rows)))


def _listed(rows: Any) -> list[Any]:
    return rows if isinstance(rows, list) else [rows]


def as_csv(rows: Any) -> bytes:
    with tempfile.TemporaryFile("w+", newline="", errors="surrogatepass") as file:
        found = [row for row in _listed(rows) if isinstance(row, dict)] or [{}]
        writer = csv.DictWriter(file, sorted({str(key) for row in found for key in row}))
        writer.writeheader()
        writer.writerows({str(key): value for key, value in row.items()} for row in found)
        file.seek(0)
        return file.read().encode(errors="surrogatepass")


def as_parquet(rows: Any) -> bytes:
    """A table of the rows; of their texts where they are too different for one."""
    try:
        return _parquet(pa.Table.from_pylist(_listed(rows)))
    except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
        return _parquet(pa.table({"text": [ascii(rows)]}))


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    parquet.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


WRITERS = {
    ".json": as_json,
    ".jsonl": as_json_lines,
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".txt": as_json_lines,
    ".jsonl.gz": lambda rows: gzip.compress(as_json_lines(rows)),
}
KINDS, SUFFIXES = st.sampled_from(list(ROWS)), st.sampled_from(list(WRITERS))


@fuzz
@given(st.data(), KINDS, SUFFIXES)
def test_rows_with_anything_in_them_are_read_or_refused(data, kind, suffix):
    rows = data.draw(mutated(ROWS[kind]))
    with written(WRITERS[suffix](rows), suffix) as path:
        survives(lambda: load(path, kind), path.parent)


@fuzz
@given(st.data(), KINDS, SUFFIXES)
def test_damaged_files_are_read_or_refused(data, kind, suffix):
    content = data.draw(broken_bytes(WRITERS[suffix](ROWS[kind])))
    with written(content, suffix) as path:
        survives(lambda: load(path, kind), path.parent)


@fuzz
@given(
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=5),
    st.sampled_from(["instruction", "chat"]),
)
def test_templates_of_anything_are_filled_in_or_refused(fragments, kind):
    setting = "template" if kind == "instruction" else "chat_template"
    with written(as_json(ROWS[kind]), ".json") as path:
        survives(lambda: load(path, kind, **{setting: "".join(fragments)}), path.parent)


def test_files_that_are_not_broken_are_read():
    for kind, rows in ROWS.items():
        with written(as_json(rows), ".json") as path:
            assert survives(lambda path=path, kind=kind: load(path, kind)) is None
