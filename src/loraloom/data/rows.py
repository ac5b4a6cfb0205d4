"""A row of a data set, which knows the file and line that it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from loraloom.errors import DataError, shown

_MAX_FIELDS = 20
"""Fields of a row that a message names."""


_MAX_FAULTS, _MAX_PLACES = 20, 30
"""Different faults that a message lists, and rows that it names for each."""


class EmptyAnswerError(DataError):
    """A row has nothing to learn where its answer should be."""


class Row(dict[str, Any]):
    """The fields of a row. To ask for one that isn't there is a DataError with file and line.

    Args:
        fields: By name.
        origin: Its file and line.
        fault: Why it could not be read, if it could not.
    """

    def __init__(self, fields: Mapping[str, Any], origin: str, fault: str = ""):
        super().__init__(fields)
        self.origin, self.fault = origin, fault

    def __missing__(self, name: str) -> NoReturn:
        if self.fault:
            self.reject(self.fault)
        fields = ", ".join(map(shown, list(self)[:_MAX_FIELDS])) or "none"
        more = f" and {len(self) - _MAX_FIELDS} more" if len(self) > _MAX_FIELDS else ""
        self.reject(f"the row has no field {name!r}; its fields are {fields}{more}")

    def reject(self, reason: str) -> NoReturn:
        """Raise the DataError that this row can't be used."""
        raise DataError(f"{self.origin}: {reason}")

    def text(self, name: str) -> str:
        """The field as a string."""
        value = self[name]
        if not isinstance(value, str):
            self.reject(f"field {name!r} must be a string, got {shown(value)}; write it as a text")
        return value

    def answer(self, name: str) -> str:
        """The field as a text that a model learns to write."""
        text = "" if self[name] is None else self.text(name)
        if not text.strip():
            self.reject_empty(f"field {name!r} is empty, so there is nothing to learn")
        return text

    def reject_empty(self, reason: str) -> NoReturn:
        """Raise the error that there is no answer in this row, and say what to do."""
        raise EmptyAnswerError(
            f"{self.origin}: {reason}; fill it in, remove the row, or set on_empty: skip"
        )

    def integer(self, name: str) -> int:
        """The field as an integer; a string of digits will do."""
        value = self[name]
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            self.reject(f"field {name!r} must be an integer, got {shown(value)}")
        if isinstance(value, float) and value != number:
            self.reject(f"field {name!r} must be an integer, got {shown(value)}")
        return number


def check_faults(faults: Sequence[tuple[str, str]], num_rows: int) -> None:
    """Refuse rows that can't be used, all of them in one message."""
    if not faults:
        return
    if len(faults) == 1:
        raise DataError("{}: {}".format(*faults[0]))
    places: dict[str, list[str]] = {}
    for origin, fault in faults:
        places.setdefault(fault, []).append(origin.rpartition(", ")[2])
    lines = [f"  {_list_places(rows)}: {fault}" for fault, rows in places.items()]
    if len(lines) > _MAX_FAULTS:
        lines[_MAX_FAULTS:] = [f"  and {len(lines) - _MAX_FAULTS} other faults"]
    source = faults[0][0].rpartition(", ")[0]
    raise DataError(
        "\n".join([f"{source}: {len(faults)} of {num_rows} rows can't be used:", *lines])
    )


def _list_places(places: Sequence[str]) -> str:
    """`line 3` for one place, `lines 3, 7, 9` for several."""
    word, _, _ = places[0].partition(" ")
    numbers = ", ".join(place.removeprefix(f"{word} ") for place in places[:_MAX_PLACES])
    more = f" and {len(places) - _MAX_PLACES} more" if len(places) > _MAX_PLACES else ""
    return f"{word}{'s' if len(places) > 1 else ''} {numbers}{more}"
