from __future__ import annotations

from loraloom.data.examples import NO_LOSS, Example
from loraloom.data.packing import first_fit, join_samples


def test_samples_go_the_longest_first_into_the_first_row_with_room():
    assert first_fit([3, 7, 2, 5, 4], max_length=10) == [[1, 0], [3, 4], [2]]


def test_rows_hold_every_sample_once_and_no_row_is_too_long():
    lengths = [1 + 7 * n % 23 for n in range(50)]
    rows = first_fit(lengths, max_length=30)
    assert sorted(place for row in rows for place in row) == list(range(50))
    assert max(sum(lengths[place] for place in row) for row in rows) <= 30


def test_the_first_token_of_a_sample_is_not_predicted_from_the_sample_before():
    row = join_samples([Example((1, 2), (1, 2), 5), Example((3, 4), (3, 4), 6)])
    assert row.input_ids == (1, 2, 3, 4)
    assert row.labels == (NO_LOSS, 2, NO_LOSS, 4)
