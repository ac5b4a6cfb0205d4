from __future__ import annotations

from loraloom.config.data import SourceConfig
from loraloom.data.encoding import check_encoded

ANY = SourceConfig(dataset="rows.jsonl", format="text")


def checked(rows, encoded):
    """The encoded rows, or the error of those that can't be used."""
    check_encoded(ANY, rows, encoded)
    return encoded
