from __future__ import annotations

import pytest

from tests.fuzz.faults import Bench


@pytest.mark.slow
def test_a_file_operation_that_fails_or_a_kill_loses_nothing(tmp_path):
    bench = Bench(tmp_path, seed=1)
    for _ in range(3):
        bench.try_fault()
    bench.try_kill()
    assert bench.defects == []
    assert bench.outcomes["killed"] == 1
