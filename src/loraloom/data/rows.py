"""A row of a data set, which knows the file and line that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from loraloom.errors import DataError, shown

_MAX_FIELDS = 20
"""Fields of a row that a message names."""


class Row(dict[str, Any]):
    """The fields of a row. To ask for one that isn't there is a DataError with file and line."""

    def __init__(self, fields: Mapping[str, Any], origin: str):
        super().__init__(fields)
        self.origin = origin

    def __missing__(self, name: str) -> NoReturn:
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
            self.reject(f"field {name!r} must be a string, got {shown(value)}")
        return value

    def texts(self, name: str) -> list[str]:
        """The field as a list of strings."""
        value = self[name]
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.reject(f"field {name!r} must be a list of strings, got {shown(value)}")
        return value

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

    def part(self, name: str) -> Row:
        """The field as a row of its own, for fields that hold fields."""
        value = self[name]
        if not isinstance(value, Mapping):
            self.reject(f"field {name!r} must be an object, got {shown(value)}")
        return Row(value, f"{self.origin}, field {name!r}")
