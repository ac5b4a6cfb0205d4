import pytest

from loraloom.training.settings import TrainConfig
from loraloom.training.step.batch import StepOrder
from tests.training.toy import toy_set


def order_of(count: int, **train) -> StepOrder:
    return StepOrder(toy_set(count=count), TrainConfig(**{"max_steps": 100, **train}))


@pytest.mark.parametrize(("count", "num_epochs", "steps"), [(10, 2, 6), (8, 3, 6), (1, 5, 5)])
def test_epochs_are_turned_into_steps(count, num_epochs, steps):
    order = order_of(count, batch_size=4, max_steps=None, num_epochs=num_epochs)
    assert order.total_steps == steps
    assert order.epochs_after(steps) == num_epochs


def test_grouping_by_length_saves_padding_and_leaves_no_example_out():
    paddings = []
    for group_by_length in (False, True):
        order = order_of(80, batch_size=4, group_by_length=group_by_length)
        rows = [order.window(step).micro_batch(0) for step in range(20)]
        assert len({row.sample_id for batch in rows for row in batch}) == 80
        lengths = [[len(row.input_ids) for row in batch] for batch in rows]
        paddings.append(sum(4 * max(batch) - sum(batch) for batch in lengths))
    assert paddings[1] < paddings[0] / 2
