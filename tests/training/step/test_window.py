from __future__ import annotations

import pytest

from loraloom.training.settings import TrainConfig
from loraloom.training.step.batch import StepOrder
from tests.training.toy import toy_set


def order_of(count: int, **train) -> StepOrder:
    return StepOrder(toy_set(count=count), TrainConfig(**{"max_steps": 100, **train}))


def ids(window) -> list[int]:
    return [example.sample_id for example in window.examples]


def test_an_epoch_has_every_example_once_in_windows_of_batch_size():
    windows = [order_of(10, batch_size=4).window(step) for step in range(3)]
    assert [len(window.examples) for window in windows] == [4, 4, 2]
    assert sorted(i for window in windows for i in ids(window)) == list(range(10))


@pytest.mark.parametrize(("count", "num_epochs", "steps"), [(10, 2, 6), (8, 3, 6), (1, 5, 5)])
def test_epochs_are_turned_into_steps(count, num_epochs, steps):
    order = order_of(count, batch_size=4, max_steps=None, num_epochs=num_epochs)
    assert order.total_steps == steps
    assert order.epochs_after(steps) == num_epochs
