"""Evaluations as files: JSON, CSV or Markdown, by the suffix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from loraloom.durable import write_output
from loraloom.eval.results import SCHEMA_VERSION
from loraloom.eval.tables import check_outputs, markdown_page


def write_evaluation(
    path: Path, value: Mapping[str, Any], tables: Sequence[Table], make_csv: Callable[[], str]
) -> None:
    """Write a .json, .csv or .md file."""
    check_outputs([path])
    match path.suffix.lower():
        case ".csv":
            text = make_csv()
        case ".md":
            text = markdown_page(tables, value)
        case _:
            text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_output(path, text)


def as_document(
    results: Mapping[str, Any],
    seeds: Any,
    comparisons: Sequence[Any],
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """Put an evaluation together as it stands in the JSON file."""
    return {
        "schema_version": SCHEMA_VERSION,
        "results": results,
        "seeds": seeds,
        "comparisons": [comparison.to_json() for comparison in comparisons],
        **details,
    }
