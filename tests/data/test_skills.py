from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from loraloom.data.questions import load_questions
from loraloom.data.skills import generate_skills
from loraloom.data.skills.rules import SKILLS
from loraloom.data.skills.splits import SPLITS, split_facts
from loraloom.errors import DataError

ROWS = {split: generate_skills(split) for split in SPLITS}


def test_there_are_at_least_six_skills_and_several_thousand_questions():
    assert len(SKILLS) >= 6
    assert len(ROWS["train"]) >= 3000
    assert min(len(ROWS["validation"]), len(ROWS["test"])) >= 500
    assert {row["skill"] for row in ROWS["test"]} == {skill.name for skill in SKILLS}


def test_no_question_occurs_twice_in_all_splits():
    questions = [row["question"] for rows in ROWS.values() for row in rows]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_no_fact_is_in_two_splits(skill):
    facts = {
        split: {fact for group in split_facts(skill, split, seed=0) for fact in group}
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not facts[one] & facts[other]
    assert sum(map(len, facts.values())) == sum(len(set(group)) for group in skill.groups)


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_no_fact_is_in_two_groups(skill):
    facts = [fact for group in skill.groups for fact in group]
    words = [fact[1] for fact in facts] if skill.name in ("noun_class", "gate", "review") else facts
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("split", SPLITS)
def test_the_right_answer_stands_in_each_place_equally_often(split):
    for skill in SKILLS:
        places = Counter(row["answer"] for row in ROWS[split] if row["skill"] == skill.name)
        assert max(places.values()) - min(places.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_fixed_answers_are_right_about_equally_often(split):
    for skill in ("noun_class", "parity", "season", "gate", "review"):
        answers = Counter(
            row["choices"][row["answer"]] for row in ROWS[split] if row["skill"] == skill
        )
        assert max(answers.values()) <= 1.2 * min(answers.values())


def test_choices_are_two_to_four_different_texts():
    for row in ROWS["train"]:
        assert 2 <= len(set(row["choices"])) == len(row["choices"]) <= 4
        assert 0 <= row["answer"] < len(row["choices"])


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    assert generate_skills("test", seed=0) == ROWS["test"]
    assert generate_skills("test", seed=1) != ROWS["test"]


def test_the_first_rows_have_all_skills_alike():
    first = Counter(row["skill"] for row in ROWS["validation"][: 10 * len(SKILLS)])
    assert set(first.values()) == {10}


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="split of skills must be one of train, validation, test"):
        generate_skills("dev")


def test_skills_take_no_path():
    with pytest.raises(DataError, match="skills is generated and takes no path"):
        load_questions("skills", "text", path="data")


def test_skills_are_questions_by_skill():
    asked = load_questions("skills", "text", limit=len(SKILLS))
    assert {question.group for question in asked} == {skill.name for skill in SKILLS}
    assert all(text.startswith(" ") for question in asked for text in question.continuations)
