import numpy as np
import pytest
from scipy import stats

from loraloom.errors import DataError
from loraloom.eval.statistics import (
    compare_paired,
    compare_ratios,
    holm,
    mcnemar_p_value,
    ratio_intervals,
    ratio_stderr,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("first", "second"), [(0, 0), (1, 0), (5, 5), (3, 11), (40, 25), (900, 1000)]
)
def test_mcnemar_is_scipys_binomial_test(first, second):
    expected = 1.0 if first + second == 0 else stats.binomtest(first, first + second).pvalue
    assert mcnemar_p_value(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p_value(second, first) == mcnemar_p_value(first, second)


def test_mcnemar_stays_exact_where_floats_would_overflow():
    assert mcnemar_p_value(0, 1000) == pytest.approx(2.0**-999)
    assert mcnemar_p_value(0, 2000) == 0.0  # below the smallest float


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (5, 5), (1, 7), (1108, 2376)])
def test_wilsons_interval_is_scipys(successes, count):
    expected = stats.binomtest(successes, count).proportion_ci(method="wilson")
    interval = wilson_interval(successes / count, count)
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def answers(seed, count=400, share=0.6):
    return (np.random.default_rng(seed).random(count) < share).astype(float).tolist()


def test_the_paired_difference_is_that_of_a_t_test_and_its_interval_scipys_bootstrap():
    first, second = answers(0), answers(1, share=0.5)
    found, test = compare_paired(first, second), stats.ttest_rel(first, second)
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert found.difference / found.stderr == pytest.approx(test.statistic)
    differences = (np.array(first) - np.array(second),)
    rng = np.random.default_rng(0)
    drawn = stats.bootstrap(differences, np.mean, n_resamples=10_000, method="percentile", rng=rng)
    assert found.interval == pytest.approx(tuple(drawn.confidence_interval), abs=0.006)
    assert compare_paired(first, second, 3) == compare_paired(np.array(first), second, seed=3)


def test_the_p_value_is_that_of_the_discordant_questions():
    found = compare_paired([1, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0])
    assert (found.num_first_better, found.num_second_better, found.num_examples) == (3, 1, 6)
    assert found.p_value == pytest.approx(stats.binomtest(3, 4).pvalue)
    thirds = compare_paired([1, 2 / 3, 0, 1], [1 / 3, 1, 0, 0])
    assert thirds.difference == pytest.approx((2 / 3 - 1 / 3 + 1) / 4)
    assert (thirds.num_first_better, thirds.num_second_better) == (2, 1)


def test_a_group_of_seeds_is_no_better_for_being_a_little_right_more_often():
    draws = np.random.default_rng(0)
    found = []
    for _ in range(40):
        seeds, single = draws.random((5, 200)) < 0.25, draws.random(200) < 0.25
        found.append(compare_paired(seeds.mean(0), single.astype(float)))
    assert all(one.num_first_better > one.num_second_better for one in found)
    assert sum(one.p_value < 0.05 for one in found) <= 5  # 2 on average


def test_a_tie_of_thirds_is_a_tie():
    tie = compare_paired([2 / 3, 2 / 3, 1 / 3, 0], [1 / 3, 1, 0, 1 / 3])
    assert (tie.difference, tie.p_value) == (0, 1)
    noise = compare_paired([np.mean([0.1, 0.2])] * 20, [np.mean([0.15, 0.15])] * 20)
    assert (noise.num_first_better, noise.num_second_better, noise.p_value) == (0, 0, 1)


def test_differences_of_several_sizes_are_tested_as_scipy_does():
    d = np.array([3, 1, -2, 2, 5, -1, 4, 0, 3, -4, 2.0])
    for values in (d, -d, d - 1):
        exact = stats.permutation_test((values,), np.sum, permutation_type="samples")
        found = compare_paired(values, np.zeros(len(d))).p_value
        assert found == pytest.approx(exact.pvalue, abs=0.02)


def test_equal_answers_do_not_differ_and_one_question_has_no_standard_error():
    same = compare_paired([1, 0, 1], [1, 0, 1])
    assert (same.difference, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert compare_paired([1], [0]).stderr is None


@pytest.mark.parametrize(("first", "second"), [([], []), ([1, 0], [1])])
def test_other_questions_can_not_be_compared(first, second):
    with pytest.raises(DataError, match="requires the same questions for both, at least one, got"):
        compare_paired(first, second)


def test_holm_multiplies_by_the_tests_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.fixture(scope="module")
def rows():
    """Losses of two adapters on rows of many lengths, and the lengths."""
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 40, size=200)
    first = lengths * generator.normal(2.0, 0.3, size=200)
    return first, first + lengths * generator.normal(0.05, 0.1, size=200), lengths


def test_the_error_of_a_ratio_is_the_spread_of_its_bootstrap(rows):
    first, _, lengths = rows
    drawn = np.random.default_rng(1).integers(200, size=(4000, 200))
    ratios = first[drawn].sum(1) / lengths[drawn].sum(1)
    assert ratio_stderr(first, lengths) == pytest.approx(ratios.std(), rel=0.05)
    assert ratio_stderr(first[:1], lengths[:1]) is None


def test_intervals_of_ratios_are_scipys(rows):
    first, second, lengths = rows
    found = ratio_intervals(np.column_stack([first, second]), lengths)
    how = {"paired": True, "vectorized": True, "method": "percentile"}
    for sums, interval in zip((first, second), found, strict=True):
        expected = stats.bootstrap(
            (sums, lengths), lambda s, n, axis: s.sum(axis) / n.sum(axis), rng=0, **how
        ).confidence_interval
        assert interval == pytest.approx((expected.low, expected.high), abs=5e-3)


def test_losses_are_compared_row_by_row(rows):
    first, second, lengths = (values.tolist() for values in rows)
    found = compare_ratios(first, second, lengths, better=-1)
    mirrored = compare_ratios(second, first, lengths, better=-1)
    assert found.difference == pytest.approx((sum(first) - sum(second)) / sum(lengths))
    assert found.interval[0] < found.difference < found.interval[1] < 0
    assert found.num_first_better == (rows[0] < rows[1]).sum()
    assert found.num_first_better + found.num_second_better == 200
    assert (mirrored.difference, mirrored.p_value) == (-found.difference, found.p_value)
