"""The splits of the skills: which facts are learnt and which are held out."""

from __future__ import annotations

import random
from itertools import chain, zip_longest
from typing import Any

from loraloom.data.skills.rules import SKILLS, Asked, Skill
from loraloom.errors import DataError

SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}
"""The part of each group's facts, in shuffled order, that a split gets."""

QUESTIONS_PER_SKILL = {"train": 480, "validation": 72, "test": 72}
"""Most questions of a skill in a split."""


def generate_skills(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of a split: `skill`, `question`, `choices` and `answer`, the right choice's index.

    No fact is in two splits. The skills take turns, so that the first n rows have about as many of
    each, and the right answer stands in each place equally often.

    Args:
        split: train, validation or test.
        seed: Another seed gives other splits.

    Raises:
        DataError: If there is no such split.
    """
    if split not in SPLITS:
        raise DataError(f"split of skills must be one of {', '.join(SPLITS)}, got {split!r}")
    turns = zip_longest(*(_rows(skill, split, seed) for skill in SKILLS))
    return [row for row in chain.from_iterable(turns) if row is not None]


def _rows(skill: Skill[Any], split: str, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(f"{split} questions of {skill.name}, seed {seed}")
    groups = [
        [asked for fact in facts for asked in skill.ask(fact)]
        for facts in split_facts(skill, split, seed)
    ]
    for questions in groups:
        generator.shuffle(questions)
    in_turns = [one for one in chain.from_iterable(zip_longest(*groups)) if one is not None]
    kept = in_turns[: QUESTIONS_PER_SKILL[split]]
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
