"""Which rows are kept from training, to measure it on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from loraloom.data.encoding import EncodedRow
from loraloom.errors import DataError


def choose_held_out(
    name: str, rows: Sequence[EncodedRow], fraction: float, seed: int
) -> frozenset[int]:
    """Indices of the held-out rows: those with the lowest seeded hashes of their tokens.

    Rows that are equal have equal hashes and stay together, so that none is learnt and measured.

    Args:
        name: The source's, for the message.
        rows: Dropped rows are passed over.
        fraction: Share of the rows, at least one row unless it is 0.
        seed: Chooses other rows.

    Raises:
        DataError: If nothing would be left to learn from.
    """
    if fraction == 0:
        return frozenset()
    hashes = {index: _hash(row, seed) for index, row in enumerate(rows) if row.pieces}
    ordered = sorted(hashes.values())
    threshold = ordered[max(round(fraction * len(ordered)), 1) - 1]
    chosen = frozenset(index for index, value in hashes.items() if value <= threshold)
    if len(chosen) == len(hashes):
        raise DataError(
            f"{name}: validation_fraction={fraction} of {len(hashes)} rows leaves nothing to learn "
            "from; give more rows, a lower fraction or validation data of their own"
        )
    return chosen


def _hash(row: EncodedRow, seed: int) -> bytes:
    tokens = " ".join(str(token) for piece in row.pieces for token in piece.input_ids)
    return hashlib.sha256(f"{seed}: {tokens}".encode()).digest()
