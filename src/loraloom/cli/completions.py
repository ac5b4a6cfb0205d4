"""Where `loraloom generate` puts completions: a file that grows row by row, or the terminal.

The file is at any time the beginning of what it will be, so an interrupted command goes on where
it was. What its texts depend on stands in a file beside it, `FILE.settings.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from loraloom.cli.options import BASE
from loraloom.config.text import parse_json, read_json
from loraloom.durable import append_text, prepare_output, write_json
from loraloom.errors import ConfigError
from loraloom.eval.evaluation import EvaluationProgress
from loraloom.generation.prompts import Prompt
from loraloom.terminal import make_console

Texts = Iterable[Sequence[str]]
"""Completions, batch by batch in the order of the rows."""


def labelled(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
) -> Iterator[dict[str, Any]]:
    """Rows with the adapter that answers each."""
    for row, prompt in zip(rows, prompts, strict=True):
        yield {**row, "adapter": prompt.adapter or BASE}


def print_answers(prompts: Sequence[Prompt], texts: Texts) -> None:
    """Print completions of one prompt, each below who answered where there are several."""
    for prompt, text in zip(prompts, chain.from_iterable(texts), strict=True):
        if len(prompts) > 1:
            print(f"[{prompt.adapter or BASE}]")
        print(text)


def print_rows(rows: Sequence[Mapping[str, Any]], texts: Texts) -> None:
    """Print rows with their completions as lines of JSON."""
    for row, text in zip(rows, chain.from_iterable(texts), strict=True):
        print(_line(row, text), end="", flush=True)


class OutputFile:
    """A file of rows with their completions."""

    def __init__(self, path: Path, rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]):
        self.path = path
        self._rows = rows
        self._settings = json.loads(json.dumps(settings))

    @property
    def settings_path(self) -> Path:
        """Of the file that says what the completions depend on."""
        return self.path.with_name(f"{self.path.name}.settings.json")

    def count_done(self, batch_size: int, *, overwrite: bool) -> int:
        """Find out where to go on; nothing is changed.

        A batch that was not finished counts as not begun, so that the file ends as one that was
        never interrupted.
        """
        prepare_output(self.path, "--output")
        if overwrite or not self.path.exists():
            return 0
        self._check_settings()
        lines = self._whole_lines()
        if len(lines) > len(self._rows):
            raise self._other(f"it has {len(lines)} rows where the input has {len(self._rows)}")
        for number, (line, row) in enumerate(zip(lines, self._rows, strict=False), start=1):
            if not _is_done(line, row):
                raise self._other(f"line {number} is not the input's row {number} completed")
        is_complete = len(lines) == len(self._rows)
        return len(lines) if is_complete else len(lines) // batch_size * batch_size

    def write(self, texts: Texts, num_done: int = 0) -> None:
        """Append rows as they are done, and show how it gets on."""
        messages = make_console(stderr=True, soft_wrap=True)
        total = len(self._rows)
        try:
            self._begin(num_done)
            with EvaluationProgress(messages) as progress:
                advance = progress.start(self.path.name, [1] * total, "rows")
                advance(range(num_done))
                for batch in texts:
                    rows = self._rows[num_done : num_done + len(batch)]
                    append_text(self.path, "".join(map(_line, rows, batch)))
                    advance(range(num_done, num_done + len(batch)))
                    num_done += len(batch)
        except OSError as error:
            raise ConfigError(f"{self.path} can't be written: {error}") from error
        except KeyboardInterrupt:
            messages.print(
                f"stopped; {num_done} of {total} rows are kept in {self.path}, the same command "
                "goes on from there"
            )
            raise

    def _begin(self, num_done: int) -> None:
        if num_done:
            os.truncate(self.path, sum(map(len, self._whole_lines()[:num_done])))
            return
        self.path.unlink(missing_ok=True)
        write_json(self.settings_path, self._settings)
        append_text(self.path, "")

    def _whole_lines(self) -> list[bytes]:
        """The lines that were written to their end."""
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [line + b"\n" for line in lines]

    def _check_settings(self) -> None:
        try:
            known = read_json(self.settings_path)
        except ConfigError:
            raise self._other(f"{self.settings_path.name} beside it can't be read") from None
        known = known if isinstance(known, dict) else {}
        for name in {**known, **self._settings}:
            if known.get(name) != self._settings.get(name):
                raise self._other(f"its texts were generated with another {name}")

    def _other(self, reason: str) -> ConfigError:
        return ConfigError(
            f"--output {self.path} must be new or what the same command has begun, but {reason}; "
            "give another file, or --overwrite"
        )


def _line(row: Mapping[str, Any], text: str) -> str:
    return json.dumps({**row, "completion": text}, ensure_ascii=False) + "\n"


def _is_done(line: bytes, row: Mapping[str, Any]) -> bool:
    """Whether a line is a row with its completion."""
    try:
        known = parse_json(line.decode(), "a row")
    except (ConfigError, UnicodeDecodeError):
        return False
    if not isinstance(known, dict) or not isinstance(known.get("completion"), str):
        return False
    return known == json.loads(_line(row, known["completion"]))
