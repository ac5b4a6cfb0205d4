"""A row of a data set, which knows the file and line that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from loraloom.errors import DataError


class Row(dict[str, Any]):
    """The fields of a row. To ask for one that isn't there is a DataError with file and line."""

    def __init__(self, fields: Mapping[str, Any], origin: str):
        super().__init__(fields)
        self.origin = origin

    def __missing__(self, name: str) -> NoReturn:
        self.reject(f"the row has no field {name!r}; its fields are {', '.join(self) or 'none'}")

    def reject(self, reason: str) -> NoReturn:
        """Raise the DataError that this row can't be used.

        Raises:
            DataError: Always.
        """
        raise DataError(f"{self.origin}: {reason}")

    def text(self, name: str) -> str:
        """The field as a string.

        Raises:
            DataError: If the field is missing or not a string.
        """
        value = self[name]
        if not isinstance(value, str):
            self.reject(f"field {name!r} must be a string, got {_shown(value)}")
        return value

    def texts(self, name: str) -> list[str]:
        """The field as a list of strings.

        Raises:
            DataError: If the field is missing or not a list of strings.
        """
        value = self[name]
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.reject(f"field {name!r} must be a list of strings, got {_shown(value)}")
        return value

    def integer(self, name: str) -> int:
        """The field as an integer; a string of digits will do.

        Raises:
            DataError: If the field is missing or not an integer.
        """
        value = self[name]
        try:
            return int(value)
        except (TypeError, ValueError):
            self.reject(f"field {name!r} must be an integer, got {_shown(value)}")

    def part(self, name: str) -> Row:
        """The field as a row of its own, for fields that hold fields.

        Raises:
            DataError: If the field is missing or not an object.
        """
        value = self[name]
        if not isinstance(value, Mapping):
            self.reject(f"field {name!r} must be an object, got {_shown(value)}")
        return Row(value, f"{self.origin}, field {name!r}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
