"""The splits of the skills: which facts are learnt and which are held out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

from loraloom.data.skills.lands import Land, land_names
from loraloom.data.skills.rules import SKILLS, Asked, Skill
from loraloom.errors import DataError

SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}
"""The part of each group's facts, in shuffled order, that a split gets."""

QUESTIONS_PER_SKILL = {"train": 480, "validation": 72, "test": 72}
"""Most questions of a skill at its home in a split."""

QUESTIONS_IN_A_LAND = {"train": 48, "validation": 8, "test": 8}
"""Most questions of a skill in each of many lands."""


def generate_skills(
    split: str, seed: int = 0, num_lands: int | None = None
) -> list[dict[str, Any]]:
    """The rows of a split: `skill`, `question`, `choices` and `answer`, the right choice's index.

    No fact is in two splits. The skills take turns, so that the first n rows have about as many of
    each, and the right answer stands in each place equally often.
    """
    if split not in SPLITS:
        raise DataError(f"split of skills must be one of {', '.join(SPLITS)}, got {split!r}")
    turns = zip_longest(*(_rows(skill, land, split, seed) for skill, land in _places(num_lands)))
    return [row for row in chain.from_iterable(turns) if row is not None]


def _places(num_lands: int | None) -> Iterator[tuple[Skill[Any], Land]]:
    """Every rule where it holds."""
    if num_lands is None:
        yield from ((skill, Land(skill.home)) for skill in SKILLS)
    else:
        for name in land_names(num_lands):
            yield from ((skill, Land(name, f"{skill.name} in {name}")) for skill in SKILLS)


def _rows(skill: Skill[Any], land: Land, split: str, seed: int) -> list[dict[str, Any]]:
    at_home = land.order is None
    most = (QUESTIONS_PER_SKILL if at_home else QUESTIONS_IN_A_LAND)[split]
    topic = skill.name if at_home else land.order
    generator = random.Random(f"{split} questions of {topic}, seed {seed}")
    facts = split_facts(skill, split, seed)
    if not at_home:  # a fact gives at least a question, and there are many lands
        facts = [generator.sample(group, min(most, len(group))) for group in facts]
    groups = [[asked for fact in group for asked in skill.ask(fact, land)] for group in facts]
    for questions in groups:
        generator.shuffle(questions)
    in_turns = [one for one in chain.from_iterable(zip_longest(*groups)) if one is not None]
    kept = in_turns[:most]
    generator.shuffle(kept)
    rows = [_row(skill, asked, place, generator) for place, asked in enumerate(kept)]
    generator.shuffle(rows)
    return rows


def split_facts(skill: Skill[Any], split: str, seed: int) -> list[list[Any]]:
    """The split's part of each group's facts; the order that is cut is the same for every split."""
    generator = random.Random(f"facts of {skill.name}, seed {seed}")
    orders = [generator.sample(group, len(group)) for group in skill.groups]
    begin, end = SPLITS[split]
    return [order[round(begin * len(order)) : round(end * len(order))] for order in orders]


def _row(skill: Skill[Any], asked: Asked, place: int, generator: random.Random) -> dict[str, Any]:
    choices = generator.sample(asked.others, len(asked.others))
    answer = place % (len(choices) + 1)
    choices.insert(answer, asked.answer)
    return {
        "skill": skill.name,
        "question": asked.question,
        "choices": choices,
        "answer": answer,
    }
