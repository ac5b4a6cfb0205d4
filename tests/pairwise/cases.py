"""Cases in which every two values of any two settings meet at least once."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Case = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]], is_possible: Callable[[Case], bool]
) -> list[Case]:
    """Draw cases until each possible pair of values occurs in one; they are always the same.

    Each new case begins with a pair that is still missing; of several random completions it is
    the one that adds most pairs (AETG, Cohen et al. 1997).
    """
    generator = random.Random(0)
    missing = {
        (first, a, second, b)
        for first, second in combinations(factors, 2)
        for a in factors[first]
        for b in factors[second]
    }
    cases: list[Case] = []
    while missing:
        first, a, second, b = min(missing, key=str)
        drawn = [_draw(factors, {first: a, second: b}, generator) for _ in range(40)]
        possible = [case for case in drawn if is_possible(case)]
        if not possible:  # the pair can't occur
            missing.remove((first, a, second, b))
            continue
        best = max(possible, key=lambda case: len(missing & set(pairs_of(case))))
        missing -= set(pairs_of(best))
        cases.append(best)
    return cases


def pairs_of(case: Case) -> Iterator[Pair]:
    """All pairs of values that a case has."""
    return ((a, case[a], b, case[b]) for a, b in combinations(case, 2))


def _draw(factors: Mapping[str, Sequence[Any]], fixed: Case, generator: random.Random) -> Case:
    return {name: fixed.get(name, generator.choice(values)) for name, values in factors.items()}
