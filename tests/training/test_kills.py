from __future__ import annotations

import pytest

from benchmarks.kills import check_kills


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    outcome = check_kills(tmp_path, kills=3, steps=20)
    assert outcome.kills > 0  # a fast process may end before the last kill
    assert outcome.differences == []
