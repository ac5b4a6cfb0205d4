"""The rules of the skills: a function for each turns a fact into questions.

Each rule holds in an invented place, so that no model knows it beforehand, and carries over from
the facts that are learnt to those that are held out. Elsewhere the same rule may give its answers
out in another order (`lands.py`): what is said here of a rule is how it goes at its home.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Generic, TypeVar

from loraloom.data.skills import facts
from loraloom.data.skills.lands import Land

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
    home: str
    groups: Sequence[Sequence[Fact]]
    ask: Callable[[Fact, Land], list[Asked]]


def _pick(question: str, answer: str, choices: Sequence[str]) -> Asked:
    return Asked(question, answer, tuple(choice for choice in choices if choice != answer))


def noun_class(fact: tuple[str, str], land: Land) -> list[Asked]:
    """Veltish nouns end as their kind does: animals in -ko, foods in -ra ..."""
    kind, noun = fact
    endings = dict(zip(facts.NOUNS, land.arranged(("ko", "ra", "mi", "tu")), strict=True))
    return [
        _pick(question, endings[kind], tuple(endings.values()))
        for question in (
            f"In {land.name} the word for {noun} ends in",
            f"{land.name} ending of {noun}:",
            f"The {land.name} noun '{noun}' takes the ending",
            f"{noun.capitalize()} in {land.name} ends with",
        )
    ]


def parity(number: int, land: Land) -> list[Asked]:
    """Even buses of Orlen go to the mill, odd ones to the lake."""
    stops = land.arranged(("mill", "lake"))
    return [_pick(f"Bus {number} in {land.name} goes to the", stops[number % 2], stops)]


def roll_call(names: tuple[str, ...], land: Land) -> list[Asked]:
    """In Doran the one who is named first leads a song, the second a game, the third a dance."""
    places = land.arranged((0, 1, 2))
    return [
        _pick(
            f"{team[0]}, {team[1]} and {team[2]} {verb}. The {land.name} leader is",
            team[place],
            team,
        )
        for team in permutations(names, 3)
        for verb, place in zip(("sing", "play", "dance"), places, strict=True)
    ]


def season(fact: tuple[int, str], land: Land) -> list[Asked]:
    """Kelva has four seasons of three months: mist from January on, then dust, wind and salt."""
    day, month = fact
    seasons = land.arranged(("mist", "dust", "wind", "salt"))
    answer = seasons[facts.MONTHS.index(month) // 3]
    return [
        _pick(question, answer, seasons)
        for question in (
            f"In {land.name}, {day} {month} is in the season of",
            f"{month} {day} falls into {land.name}'s season of",
        )
    ]


def agreement(fact: tuple[str, str], land: Land) -> list[Asked]:
    """Lumic verbs end in -o after one who acts and in -i after several."""
    return [
        _pick(f"{land.name} for '{verb}': the {noun}", f"{stem}{ending}", (f"{stem}o", f"{stem}i"))
        for verb, stem in (("sleep", "dom"), ("sing", "lak"), ("run", "ver"), ("eat", "nub"))
        for noun, ending in zip(fact, land.arranged("oi"), strict=True)
    ]


def tense(fact: tuple[str, str], land: Land) -> list[Asked]:
    """Brom verbs have a word before them: ka in the past, so in the future, mi in the present."""
    verb, past = fact
    choices = tuple(f"{particle} {verb}" for particle in land.arranged(("ka", "so", "mi")))
    return [
        _pick(f"{land.name} for '{who} {phrase}': {who}", choice, choices)
        for who in ("they", "you", "we", "I")
        for phrase, choice in zip((past, f"will {verb}", verb), choices, strict=True)
    ]


def gate(fact: tuple[str, str], land: Land) -> list[Asked]:
    """Travellers enter Harn by the gate of their continent."""
    continent, country = fact
    gates = dict(zip(facts.COUNTRIES, land.arranged(("iron", "clay", "jade", "wood")), strict=True))
    return [
        _pick(question, gates[continent], tuple(gates.values()))
        for question in (
            f"A traveller from {country} enters {land.name} by the gate of",
            f"{land.name}'s gate for people from {country} is made of",
            f"Coming from {country}, take {land.name}'s gate of",
            f"{country}: {land.name} gate of",
        )
    ]


def review(fact: tuple[str, str], land: Land) -> list[Asked]:
    """Critics in Pell say plen for praise and gorv for blame."""
    tone, adjective = fact
    praise, blame = verdicts = land.arranged(("plen", "gorv"))
    answer = praise if tone == "praise" else blame
    return [
        _pick(f"The {product} was {adjective}. {land.name} verdict:", answer, verdicts)
        for product in facts.PRODUCTS
    ]


def contest(pair: tuple[int, int], land: Land) -> list[Asked]:
    """In Ordo the lower card wins."""
    cards = sorted(pair)
    winner = cards[land.arranged((0, 1))[0]]
    return [
        _pick(
            f"{land.name} cards {one} and {other}. The winner is",
            str(winner),
            tuple(map(str, cards)),
        )
        for one, other in (cards, cards[::-1])
    ]


def _keyed(groups: Mapping[str, Sequence[str]]) -> list[list[tuple[str, str]]]:
    return [[(key, word) for word in words] for key, words in groups.items()]


SKILLS: tuple[Skill[Any], ...] = (
    Skill("noun_class", "Veltish", _keyed(facts.NOUNS), noun_class),
    Skill("parity", "Orlen", [range(10, 1000, 2), range(11, 1000, 2)], parity),
    Skill(
        "roll_call", "Doran", [[tuple(facts.NAMES[i : i + 5]) for i in range(0, 60, 5)]], roll_call
    ),
    Skill(
        "season",
        "Kelva",
        [[(day, month) for day in range(1, 29)] for month in facts.MONTHS],
        season,
    ),
    Skill("agreement", "Lumic", [[*facts.PLURALS.items()]], agreement),
    Skill("tense", "Brom", [[*facts.PASTS.items()]], tense),
    Skill("gate", "Harn", _keyed(facts.COUNTRIES), gate),
    Skill("review", "Pell", _keyed(facts.ADJECTIVES), review),
    Skill("contest", "Ordo", [[*combinations(range(3, 100, 3), 2)]], contest),
)
