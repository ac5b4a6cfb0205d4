"""How sure an accuracy is, and whether two adapters differ on the same questions.

Questions are the sample. Everything here says how results would move with other questions; how they
move with another training seed is what `comparison.summarise_seeds` measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from loraloom.errors import DataError

CONFIDENCE = 0.95
"""Of every interval."""

NUM_RESAMPLES = 10_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class PairedComparison:
    """How much better one adapter is than another on the same questions.

    Args:
        difference: Accuracy of the first minus that of the second, in [-1, 1].
        stderr: Of the difference, sd(d) / sqrt(n) over the questions' differences d; None for a
            single question.
        interval: Percentile bootstrap interval of the difference.
        p_value: Two-sided, of the exact sign test over questions, which is McNemar's test where
            both are single adapters.
        num_first_better: Questions on which the first did better.
        num_second_better: Questions on which the second did better.
        num_examples: How many questions.
    """

    difference: float
    stderr: float | None
    interval: tuple[float, float]
    p_value: float
    num_first_better: int
    num_second_better: int
    num_examples: int


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Compute the score interval of a share of successes; it stays in [0, 1], also at 0 and 1.

    Source:
        Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mcnemar_p_value(num_first: int, num_second: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test, min(1, 2 P[X ≤ min(b, c)]).

    X is binomial with b + c trials of 1/2. Integers keep it exact for any number of questions.

    Source:
        McNemar 1947, Note on the sampling error of the difference between correlated proportions.
    """
    trials = num_first + num_second
    term = tail = 1
    for successes in range(min(num_first, num_second)):
        term = term * (trials - successes) // (successes + 1)
        tail += term
    return min(1.0, 2 * tail / 2**trials)


def compare_paired(
    first: Sequence[float | int], second: Sequence[float | int], seed: int = 0
) -> PairedComparison:
    """Compare two adapters, or two groups of seeds, on the same questions.

    Args:
        first: For each question 1 if it was answered right, 0 if not; for a group of adapters that
            differ in their seed the share of them that answered it right.
        second: The same of the other, in the same order.
        seed: Of the bootstrap.

    Raises:
        DataError: If there are no questions, or not the same number.
    """
    if len(first) != len(second) or not first:
        raise DataError(
            "a paired comparison needs the same questions of both, at least one, got "
            f"{len(first)} and {len(second)}"
        )
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    count = len(differences)
    num_first, num_second = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedComparison(
        difference=float(differences.mean()),
        stderr=float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else None,
        interval=_bootstrap_interval(differences, seed),
        p_value=mcnemar_p_value(num_first, num_second),
        num_first_better=num_first,
        num_second_better=num_second,
        num_examples=count,
    )


def compare_losses(
    first: Sequence[int | float],
    second: Sequence[int | float],
    num_tokens: Sequence[int],
) -> PairedComparison:
    """Compare the losses a token of two adapters on the same rows.

    The better one of a row is that with the lower loss. A loss is a ratio of sums over rows, so
    `stderr` is that of a ratio, and the bootstrap draws rows.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    lengths = np.asarray(num_tokens, dtype=np.float64)
    ((low, high),) = ratio_intervals(differences[:, None], lengths)
    num_first, num_second = int((differences < 0).sum()), int((differences > 0).sum())
    return PairedComparison(
        difference=float(differences.sum() / lengths.sum()),
        stderr=ratio_stderr(differences, lengths),
        interval=(low, high),
        p_value=mcnemar_p_value(num_first, num_second),
        num_first_better=num_first,
        num_second_better=num_second,
        num_examples=len(differences),
    )


def ratio_stderr(sums: np.ndarray, lengths: np.ndarray) -> float | None:
    """Compute the standard error of Σ sums / Σ lengths over rows; None for a single row.

    It is that of the ratio's linear part, sqrt(n / (n - 1) Σ (s_i - R l_i)²) / Σ l_i.

    Source:
        Cochran 1977, Sampling Techniques, section 6.3.
    """
    count, total = len(sums), lengths.sum()
    if count == 1:
        return None
    deviations = sums - sums.sum() / total * lengths
    return float(math.sqrt(count / (count - 1) * np.square(deviations).sum()) / total)


def ratio_intervals(sums: np.ndarray, lengths: np.ndarray) -> list[tuple[float, float]]:
    """Compute percentile bootstrap intervals of Σ sums / Σ lengths, all from the same resamples."""
    count, totals = len(lengths), np.column_stack([sums, lengths])
    generator = np.random.default_rng(0)
    means = np.empty((NUM_RESAMPLES, totals.shape[1]))
    for resample in means:
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        resample[:] = times @ totals
    ratios = means[:, :-1] / means[:, -1:]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail), axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests, so that one of them below 5 % is news of all.

    The i-th smallest of m is multiplied by m - i + 1, and none may be below a smaller one's.

    Source:
        Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = highest
    return adjusted


def _bootstrap_interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """Resample questions with replacement and take percentiles of their mean difference.

    Differences take few values, so a resample is a multinomial draw of how often each occurs.
    """
    values, counts = np.unique(differences, return_counts=True)
    num_questions = len(differences)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(num_questions, counts / num_questions, size=NUM_RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws @ values / num_questions, (tail, 1 - tail))
    return float(low), float(high)
