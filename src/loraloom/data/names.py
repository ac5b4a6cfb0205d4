"""Names that are nearly right: what an error offers instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """The question `did you mean 'x'? ` for the nearest known name; nothing if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {nearest[0]!r}? " if nearest else ""
