"""JSON as loraloom reads it, whoever wrote it: strict, finite, and of a bounded depth.

The parser is pydantic's. It takes at most 200 levels, no number of more than 4,300 digits, no NaN
and no half of a surrogate pair; numbers that a float can't hold are refused here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from loraloom.errors import ConfigError, LoraloomError

MAX_FILE_BYTES = 2**28
"""Of a JSON file that is read as a whole, unless its reader says less."""

_FAULT = re.compile(r"(?P<problem>.*?)(?: at line (?P<line>\d+) column (?P<column>\d+))?", re.S)
_TEXT_OR_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<number>-?\d[\d.eE+-]*)')
_MAY_BE_TOO_LARGE = re.compile(r"\d{200}|[eE]\+?\d{3}")


def parse_json(
    text: str, origin: str, error: type[LoraloomError] = ConfigError, line: int = 1
) -> Any:
    """The value of a JSON text."""
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as fault:
        raise error(f"{origin}{_describe(str(fault), line)}") from None
    except TypeError:  # pydantic takes no text that could not be written as UTF-8
        raise error(f"{origin} must be JSON, line {line}: half a surrogate pair") from None
    if _MAY_BE_TOO_LARGE.search(text):
        fields = _find_infinite(value)
        if fields is not None:
            place = ", ".join([origin, f"line {line + _lines_before_infinite(text)}", *fields])
            raise error(f"{place} must be a number that is finite as a float, got a larger one")
    return value


def read_json(
    path: Path, error: type[LoraloomError] = ConfigError, max_bytes: int = MAX_FILE_BYTES
) -> Any:
    """The value of a JSON file."""
    return parse_json(read_text(path, error, max_bytes), str(path), error)


def read_text(path: Path, error: type[LoraloomError], max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a plain file in UTF-8, with or without a byte order mark."""
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait
            raise error(f"{path} must be a file, it is something else")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as fault:
        raise error(f"{path} can't be read: {fault.strerror}") from None
    if len(data) > max_bytes:
        raise error(f"{path} must have at most {max_bytes:,} bytes, it has more")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{path} must be text in UTF-8, byte {fault.start:,} is not") from None


def _describe(fault: str, first_line: int) -> str:
    match = _FAULT.fullmatch(fault)
    assert match is not None, "every text has the pattern"
    place = ""
    if match["line"] is not None:
        place = f", line {first_line + int(match['line']) - 1}, column {match['column']}"
    problem = match["problem"].replace("recursion limit exceeded", "more than 200 levels")
    return f" must be JSON{place}: {problem}"


def _find_infinite(value: Any) -> list[str] | None:
    """Keys and places that lead to the first number that no float holds; None for none."""
    if isinstance(value, int | float):
        return None if _is_finite(value) else []
    if not isinstance(value, dict | list):
        return None
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        fields = _find_infinite(entry)
        if fields is not None:
            return [str(key), *fields]
    return None


def _lines_before_infinite(text: str) -> int:
    numbers = (match for match in _TEXT_OR_NUMBER.finditer(text) if match["number"])
    start = next(number.start() for number in numbers if not _is_finite(number["number"]))
    return text.count("\n", 0, start)


def _is_finite(number: int | float | str) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False
