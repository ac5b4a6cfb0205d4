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
