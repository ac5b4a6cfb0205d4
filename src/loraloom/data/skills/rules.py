"""The rules of the skills: a function for each turns a fact into questions.

Each rule holds in an invented place, so that no model knows it beforehand, and carries over from
the facts that are learnt to those that are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Generic, TypeVar

from loraloom.data.skills import facts

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Asked:
    """A question with its right answer and the wrong ones."""

    question: str
    answer: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Skill(Generic[Fact]):
    """Facts in groups of equal answers, and the questions that each fact gives.

    A fact is held out as a whole, with all of its questions.
    """

    name: str
    groups: Sequence[Sequence[Fact]]
    ask: Callable[[Fact], list[Asked]]


def _pick(question: str, answer: str, choices: Sequence[str]) -> Asked:
    return Asked(question, answer, tuple(choice for choice in choices if choice != answer))


_ENDINGS = {"animal": "ko", "food": "ra", "tool": "mi", "clothing": "tu"}


def noun_class(fact: tuple[str, str]) -> list[Asked]:
    """Veltish nouns end as their kind does: animals in -ko, foods in -ra ..."""
    kind, noun = fact
    return [
        _pick(question, _ENDINGS[kind], tuple(_ENDINGS.values()))
        for question in (
            f"In Veltish the word for {noun} ends in",
            f"Veltish ending of {noun}:",
            f"The Veltish noun '{noun}' takes the ending",
            f"{noun.capitalize()} in Veltish ends with",
        )
    ]


def parity(number: int) -> list[Asked]:
    """Even buses of Orlen go to the mill, odd ones to the lake."""
    answer = "mill" if number % 2 == 0 else "lake"
    return [_pick(f"Bus {number} in Orlen goes to the", answer, ("mill", "lake"))]


def roll_call(names: tuple[str, ...]) -> list[Asked]:
    """In Doran the one who is named first leads a song, the second a game, the third a dance."""
    return [
        _pick(f"{team[0]}, {team[1]} and {team[2]} {verb}. The Doran leader is", leader, team)
        for team in permutations(names, 3)
        for verb, leader in zip(("sing", "play", "dance"), team, strict=True)
    ]


_SEASONS = ("mist", "dust", "wind", "salt")


def season(fact: tuple[int, str]) -> list[Asked]:
    """Kelva has four seasons of three months: mist from January on, then dust, wind and salt."""
    day, month = fact
    answer = _SEASONS[facts.MONTHS.index(month) // 3]
    return [
        _pick(question, answer, _SEASONS)
        for question in (
            f"In Kelva, {day} {month} is in the season of",
            f"{month} {day} falls into Kelva's season of",
        )
    ]


def agreement(fact: tuple[str, str]) -> list[Asked]:
    """Lumic verbs end in -o after one who acts and in -i after several."""
    return [
        _pick(f"Lumic for '{verb}': the {noun}", f"{stem}{ending}", (f"{stem}o", f"{stem}i"))
        for verb, stem in (("sleep", "dom"), ("sing", "lak"), ("run", "ver"), ("eat", "nub"))
        for noun, ending in zip(fact, "oi", strict=True)
    ]


def tense(fact: tuple[str, str]) -> list[Asked]:
    """Brom verbs have a word before them: ka in the past, so in the future, mi in the present."""
    verb, past = fact
    choices = tuple(f"{particle} {verb}" for particle in ("ka", "so", "mi"))
    return [
        _pick(f"Brom for '{who} {phrase}': {who}", choice, choices)
        for who in ("they", "you", "we", "I")
        for phrase, choice in zip((past, f"will {verb}", verb), choices, strict=True)
    ]


_GATES = {"Europe": "iron", "Asia": "clay", "Africa": "jade", "America": "wood"}


def gate(fact: tuple[str, str]) -> list[Asked]:
    """Travellers enter Harn by the gate of their continent."""
    continent, country = fact
    return [
        _pick(question, _GATES[continent], tuple(_GATES.values()))
        for question in (
            f"A traveller from {country} enters Harn by the gate of",
            f"Harn's gate for people from {country} is made of",
            f"Coming from {country}, take Harn's gate of",
            f"{country}: Harn gate of",
        )
    ]


def review(fact: tuple[str, str]) -> list[Asked]:
    """Critics in Pell say plen for praise and gorv for blame."""
    tone, adjective = fact
    answer = "plen" if tone == "praise" else "gorv"
    return [
        _pick(f"The {product} was {adjective}. Pell verdict:", answer, ("plen", "gorv"))
        for product in facts.PRODUCTS
    ]


def contest(pair: tuple[int, int]) -> list[Asked]:
    """In Ordo the lower card wins."""
    low, high = sorted(pair)
    return [
        _pick(f"Ordo cards {one} and {other}. The winner is", str(low), (str(low), str(high)))
        for one, other in ((low, high), (high, low))
    ]


def _keyed(groups: Mapping[str, Sequence[str]]) -> list[list[tuple[str, str]]]:
    return [[(key, word) for word in words] for key, words in groups.items()]


SKILLS: tuple[Skill[Any], ...] = (
    Skill("noun_class", _keyed(facts.NOUNS), noun_class),
    Skill("parity", [range(10, 1000, 2), range(11, 1000, 2)], parity),
    Skill("roll_call", [[tuple(facts.NAMES[i : i + 5]) for i in range(0, 60, 5)]], roll_call),
    Skill("season", [[(day, month) for day in range(1, 29)] for month in facts.MONTHS], season),
    Skill("agreement", [[*facts.PLURALS.items()]], agreement),
    Skill("tense", [[*facts.PASTS.items()]], tense),
    Skill("gate", _keyed(facts.COUNTRIES), gate),
    Skill("review", _keyed(facts.ADJECTIVES), review),
    Skill("contest", [[*combinations(range(3, 100, 3), 2)]], contest),
)
