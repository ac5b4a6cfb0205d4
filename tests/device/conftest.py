"""Tests on a pretend accelerator: `scripts/test tests/device -n 0`, apart from the others."""

from collections.abc import Iterator

import pytest

from tests.device.pretend import Log, pretend


@pytest.fixture
def accelerator() -> Iterator[Log]:
    """The pretend device, which notes waits."""
    with pretend() as log:
        yield log
