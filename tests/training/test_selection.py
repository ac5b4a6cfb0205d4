from __future__ import annotations

from loraloom.training.job import Selection, metric_mode


def test_accuracies_grow_and_losses_fall():
    assert metric_mode("eval/piqa/accuracy") == "max"
    assert metric_mode("eval/rewards/margins") == "max"
    assert metric_mode("eval/loss") == "min"
    assert metric_mode(None) == "min"


def test_a_lower_loss_is_better():
    selection, losses = Selection("eval/loss"), (3.0, 2.0, 2.0, 4.0)
    taken = [selection.update(step, {"eval/loss": loss}) for step, loss in enumerate(losses)]
    assert taken == [True, True, False, False]
    assert (selection.value, selection.step, selection.evaluations_since) == (2, 1, 2)


def test_a_higher_accuracy_is_better_and_brings_its_other_metrics():
    selection = Selection("eval/piqa/accuracy")
    selection.update(1, {"eval/piqa/accuracy": 0.5, "eval/loss": 1.0})
    selection.update(2, {"eval/piqa/accuracy": 0.6, "eval/loss": 2.0})
    assert selection.metrics == {"eval/piqa/accuracy": 0.6, "eval/loss": 2.0}


def test_without_a_metric_nothing_is_best():
    selection = Selection(None)
    assert not selection.update(1, {"eval/piqa/accuracy": 0.5})
    assert selection.step is None
