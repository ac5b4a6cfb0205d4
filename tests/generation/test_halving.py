from __future__ import annotations

import pytest
import torch

from loraloom.errors import DataError
from loraloom.generation.scoring import in_halves


def limited(most, seen):
    """Double numbers, at most so many at once."""

    def compute(numbers):
        seen.append(len(numbers))
        if len(numbers) > most:
            raise torch.OutOfMemoryError
        return [2 * number for number in numbers]

    return compute


def test_what_fits_is_computed_at_once():
    seen = []
    assert in_halves(limited(5, seen), range(5), str) == [0, 2, 4, 6, 8]
    assert seen == [5]


def test_what_does_not_fit_is_halved_in_order():
    seen = []
    assert in_halves(limited(2, seen), range(7), str) == [0, 2, 4, 6, 8, 10, 12]
    assert seen == [7, 4, 2, 2, 3, 2, 1]


def test_one_that_does_not_fit_is_named():
    with pytest.raises(DataError, match="number 3 must fit into memory, it doesn't, even alone"):
        in_halves(limited(0, []), [3, 4], lambda number: f"number {number}")


def test_other_errors_pass():
    def broken(numbers):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        in_halves(broken, [1, 2], str)
