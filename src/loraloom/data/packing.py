"""Several samples in one row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from loraloom.data.examples import NO_LOSS, Example


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put samples into rows: each, the longest first, into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(place)
        room[row] -= length
    return rows


def join_samples(samples: Sequence[Example]) -> Example:
    """Put samples side by side; what follows a sample's end is not predicted from it."""
    if len(samples) == 1:
        return samples[0]
    labels = chain.from_iterable((NO_LOSS, *sample.labels[1:]) for sample in samples)
    tokens = chain.from_iterable(sample.input_ids for sample in samples)
    return Example(tuple(tokens), tuple(labels), samples[0].sample_id)
