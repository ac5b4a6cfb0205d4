from __future__ import annotations

import math

import pytest

from loraloom.errors import DataError
from loraloom.eval.accuracy import QuestionScore, accuracy, accuracy_by_group
from tests.eval.scoring import question


def scored(log_likelihoods, gold=0, normalizers=None, group=None):
    answers = ["x"] * len(log_likelihoods)
    asked = question("?", answers, gold, group=group, normalizers=normalizers)
    return QuestionScore(asked, tuple(log_likelihoods))


def test_the_highest_score_is_chosen():
    assert scored([-2.0, -1.0, -3.0]).chosen == 1


def test_the_first_of_equals_is_chosen():
    assert scored([-2.0, -1.0, -1.0]).chosen == 1


def test_normalizers_divide():
    score = scored([-6.0, -4.0], normalizers=[3.0, 1.0])
    assert score.scores == (-2.0, -4.0)
    assert score.chosen == 0


def test_a_score_that_is_not_finite_chooses_nothing_and_is_wrong():
    score = scored([-1.0, math.nan], gold=0)
    assert (score.chosen, score.correct, score.finite) == (None, False, False)


def test_accuracy_comes_with_its_sample_standard_error():
    result = accuracy([scored([-1.0, -2.0], gold) for gold in (0, 0, 0, 1)])
    assert (result.accuracy, result.num_examples) == (0.75, 4)
    assert result.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_one_question_has_no_standard_error():
    assert accuracy([scored([-1.0, -2.0])]).stderr is None


def test_accuracy_of_nothing_is_an_error():
    with pytest.raises(DataError, match="at least one question"):
        accuracy([])


def test_groups_are_measured_apart_and_sorted():
    scores = [
        scored([-1.0, -2.0], group="sums"),
        scored([-1.0, -2.0], 1, group="sums"),
        scored([-1.0, -2.0], group="colours"),
        scored([-1.0, -2.0]),
    ]
    groups = accuracy_by_group(scores)
    assert list(groups) == ["colours", "sums"]
    assert [result.accuracy for result in groups.values()] == [1.0, 0.5]
    assert sum(result.num_examples for result in groups.values()) == 3
