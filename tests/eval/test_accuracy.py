from __future__ import annotations

import math

import pytest

from loraloom.errors import DataError
from loraloom.eval.scores import (
    QuestionScore,
    accuracy,
    accuracy_by_group,
    majority_share,
)
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


ASKED = [
    question("?", ["yes", "no"], 0),
    question("?", ["no", "yes"], 1),
    question("?", ["no", "yes"], 1),
    question("?", ["no", "yes"], 0),
    question("?", ["maybe", "no", "yes"], 0),
]


def share_of_constant(answer):
    """How many questions are right if everybody is answered so."""
    right = [answer in (q.labels[q.gold], q.continuations[q.gold]) for q in ASKED]
    return sum(right) / len(right)


def test_the_majority_is_the_best_constant_answer():
    answers = {"A", "B", "C", " yes", " no", " maybe"}
    assert majority_share(ASKED) == max(map(share_of_constant, answers)) == 0.6
    assert majority_share(ASKED[3:]) == 1.0  # both are A


def test_a_text_that_all_choices_share_is_no_answer():
    ends = [question("?", ["it is", "it is"], gold) for gold in (0, 1)]
    assert majority_share(ends) == 0.5


def test_an_accuracy_that_a_constant_answer_reaches_does_not_beat_it():
    scores = [
        QuestionScore(q, tuple(-1.0 if i == 0 else -2.0 for i in range(len(q.labels))))
        for q in ASKED
    ]
    assert accuracy(scores).accuracy == accuracy(scores).majority == 0.6
    assert not accuracy(scores).beats_majority
