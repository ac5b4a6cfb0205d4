"""Make one data set of short instructions from several: files for training, validation and test.

    python recipes/mixture/instructions.py yahma/alpaca-cleaned databricks/databricks-dolly-15k \\
        --output runs/mixture/instructions

Each source is a name on the hub or a file of JSON lines, with the columns of Alpaca or of Dolly.
Rows with more characters than --longest are left out, and so is an instruction's second answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

COLUMNS = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
}
SIZES = {"validation": 96, "test": 400}
"""Rows; the others are for training."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("sources", nargs="+", help="names on the hub, or files")
    add("--output", type=Path, required=True, help="directory of the files")
    add("--longest", type=int, default=400, help="characters of a row")
    args = parser.parse_args(arguments)
    found = [row for source in args.sources for row in read(source)]
    first = {(row["instruction"], row["input"]): row for row in reversed(found)}
    rows = [row for row in first.values() if sum(map(len, row.values())) <= args.longest]
    random.Random(0).shuffle(rows)
    args.output.mkdir(parents=True)
    for split, size in {**SIZES, "train": len(rows)}.items():
        lines = [json.dumps(row) + "\n" for row in rows[:size]]
        (args.output / f"{split}.jsonl").write_text("".join(lines))
        rows = rows[size:]
        print(f"{split}: {len(lines)} rows", flush=True)


def read(source: str) -> Iterator[dict[str, str]]:
    """Read a source's rows, with the columns of Alpaca."""
    is_file = Path(source).exists()
    named: Any = {"path": "json", "data_files": source} if is_file else {"path": source}
    for row in datasets.load_dataset(**named, split="train"):
        yield {
            name: next((row[one] for one in names if row.get(one)), "")
            for name, names in COLUMNS.items()
        }


if __name__ == "__main__":
    main()
