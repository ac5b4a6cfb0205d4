import hashlib
import json
import re
from collections import Counter
from itertools import combinations

import pytest

from loraloom.config.data import MAX_LANDS, SourceConfig
from loraloom.data import skills
from loraloom.data.skills import SKILLS, SPLITS, generate_skills, land_names, split_facts
from loraloom.data.tasks import load_question_set
from loraloom.errors import ConfigError, DataError

ROWS = {split: generate_skills(split) for split in SPLITS}
NUM_LANDS = 6
IN_LANDS = {split: generate_skills(split, land_names(NUM_LANDS)) for split in SPLITS}


def test_the_rows_are_those_that_figures_were_measured_with():
    for rows, start in ((ROWS, "2f5ce75dbd011175"), (IN_LANDS, "fd27d711c48d9f6a")):
        digest = hashlib.sha256(json.dumps(list(rows.values())).encode()).hexdigest()
        assert digest.startswith(start)


@pytest.mark.parametrize("by_split", [ROWS, IN_LANDS], ids=["home", "lands"])
def test_no_question_occurs_twice_in_all_splits(by_split):
    questions = [row["question"] for rows in by_split.values() for row in rows]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_no_fact_is_in_two_splits_or_groups(skill):
    facts = {
        split: {fact for group in split_facts(skill, split) for fact in group} for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not facts[one] & facts[other]
    assert sum(map(len, facts.values())) == sum(len(set(group)) for group in skill.groups)
    words = [fact[1] for group in skill.groups for fact in group if isinstance(fact[1], tuple)]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("split", SPLITS)
def test_the_right_answer_is_in_each_place_and_a_fixed_one_is_right_about_equally_often(split):
    for skill in SKILLS:
        rows = [row for row in ROWS[split] if row["skill"] == skill.name]
        places = Counter(row["answer"] for row in rows)
        assert max(places.values()) - min(places.values()) <= 1
        assert all(2 <= len(set(row["choices"])) == len(row["choices"]) <= 4 for row in rows)
        if skill.name in ("noun_class", "parity", "season", "gate", "review"):
            answers = Counter(row["choices"][row["answer"]] for row in rows)
            assert max(answers.values()) <= 1.2 * min(answers.values())


def test_skills_are_questions_by_skill():
    asked = load_question_set("skills", "text", limit=len(SKILLS)).questions
    assert [question.group for question in asked] == [skill.name for skill in SKILLS]
    asked = load_question_set("skills@2", "text", "test").questions
    assert len(asked) == 2 * 8 * len(SKILLS)
    assert {question.task for question in asked} == {"skills@2"}


def test_every_land_has_all_rules_with_as_many_questions_whatever_lands_there_are():
    for split, most in (("train", 48), ("validation", 8), ("test", 8)):
        count = Counter(row["skill"] for row in IN_LANDS[split])
        assert set(count.values()) == {NUM_LANDS * most}
        assert len(count) == len(SKILLS)
    fewer = generate_skills("test", land_names(2))
    kept = [row for row in IN_LANDS["test"] if any(n in row["question"] for n in land_names(2))]
    assert sorted(map(str, kept)) == sorted(map(str, fewer))


def test_lands_have_names_that_are_no_words():
    names = land_names(MAX_LANDS)
    assert len(set(names)) == MAX_LANDS
    assert not set(re.findall(r"\w+", json.dumps(skills._WORDS))) & set(names)


@pytest.mark.parametrize("task", ["skills@601", "skills@0", "skills@", "skills@x"])
def test_a_number_of_lands_must_be_one_that_there_is(task):
    with pytest.raises(ValueError, match="task must be"):
        SourceConfig(task=task)
    with pytest.raises(ConfigError, match="task must be"):
        load_question_set(task, "text")


def test_skills_have_three_splits_and_no_path():
    with pytest.raises(DataError, match="split of skills must be one of train, validation, test"):
        generate_skills("dev")
    with pytest.raises(DataError, match="skills does not support path"):
        load_question_set("skills", "text", path="data")
