from __future__ import annotations

import pytest

from loraloom.training.settings import TrainConfig
from loraloom.training.step.window import StepOrder, longest_row
from tests.training.toy import toy_pair_set, toy_set


def order_of(count: int, **train) -> StepOrder:
    return StepOrder(toy_set(count=count), TrainConfig(**{"max_steps": 100, **train}))


def ids(window) -> list[int]:
    return [example.sample_id for example in window.examples]


def test_an_epoch_has_every_example_once_in_windows_of_batch_size():
    order = order_of(10, batch_size=4)
    windows = [order.window(step) for step in range(3)]
    assert [len(window.examples) for window in windows] == [4, 4, 2]
    assert sorted(i for window in windows for i in ids(window)) == list(range(10))


def test_each_epoch_has_its_own_order():
    order = order_of(10, batch_size=10)
    assert ids(order.window(0)) != ids(order.window(1))
    assert order.window(1).epoch == 1


def test_a_window_does_not_depend_on_those_before():
    order = order_of(10, batch_size=4)
    for step in range(7):
        before = ids(order.window(step))
    assert ids(order_of(10, batch_size=4).window(6)) == before


def test_micro_batches_cut_a_window_into_parts():
    window = order_of(10, batch_size=6, micro_batch_size=2).window(1)
    assert window.num_micro_batches == 2  # four examples are left
    parts = [*window.micro_batch(0), *window.micro_batch(1)]
    assert parts == list(window.examples)


@pytest.mark.parametrize(("count", "num_epochs", "steps"), [(10, 2, 6), (8, 3, 6), (1, 5, 5)])
def test_epochs_are_turned_into_steps(count, num_epochs, steps):
    order = order_of(count, batch_size=4, max_steps=None, num_epochs=num_epochs)
    assert order.total_steps == steps
    assert order.epochs_after(steps) == num_epochs


def test_epochs_are_counted_in_examples():
    order = order_of(10, batch_size=4)
    assert [order.epochs_after(step) for step in range(5)] == [0, 0.4, 0.8, 1, 1.4]


def test_groups_by_length_have_every_example_once_and_lengths_alike():
    order = order_of(200, batch_size=4, group_by_length=True)
    windows = [order.window(step) for step in range(order.steps_per_epoch)]
    assert sorted(i for window in windows for i in ids(window)) == list(range(200))
    spreads = [max(lengths(window)) - min(lengths(window)) for window in windows[1:]]
    assert sum(spread > 1 for spread in spreads) < 4  # where mega-batches meet
    assert max(lengths(windows[0])) == 9


def lengths(window) -> list[int]:
    return [len(example.input_ids) for example in window.examples]


def test_groups_by_length_are_other_ones_in_each_epoch_and_the_same_in_each_run():
    order = order_of(64, batch_size=4, group_by_length=True)
    again = order_of(64, batch_size=4, group_by_length=True)
    assert ids(order.window(17)) == ids(again.window(17))
    assert ids(order.window(1)) != ids(order.window(17))


def test_a_pair_is_as_long_as_its_longest_row():
    training_set = toy_pair_set(40)
    config = TrainConfig(max_steps=10, batch_size=4, group_by_length=True)
    windows = [StepOrder(training_set, config).window(step) for step in range(10)]
    longest = [[longest_row(example) for example in window.examples] for window in windows]
    assert longest[0][0] == max(map(longest_row, training_set.examples))
    assert all(rows == sorted(rows, reverse=True) for rows in longest)
