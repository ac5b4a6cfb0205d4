from __future__ import annotations

from loraloom.data.examples import NO_LOSS, Example, count_labels


def test_the_first_token_is_not_predicted():
    assert count_labels(Example((1, 2, 3), (1, 2, 3), 0)) == 2
    assert count_labels(Example((1, 2, 3), (NO_LOSS, NO_LOSS, 3), 0)) == 1
    assert count_labels(Example((1,), (1,), 0)) == 0
