"""The choice tasks by name."""

from __future__ import annotations

from loraloom.config.data import is_skills, is_task_file
from loraloom.config.faults import suggestion
from loraloom.data.tasks.choice_task import ChoiceTask
from loraloom.data.tasks.commonsense import (
    ARC_CHALLENGE,
    ARC_EASY,
    BOOLQ,
    HELLASWAG,
    OPENBOOKQA,
    PIQA,
    SOCIAL_I_QA,
    WINOGRANDE,
)
from loraloom.data.tasks.skills import SKILLS, skills_task
from loraloom.data.tasks.task_file import load_task
from loraloom.errors import ConfigError

TASKS: dict[str, ChoiceTask] = {
    "arc_easy": ARC_EASY,
    "arc_challenge": ARC_CHALLENGE,
    "boolq": BOOLQ,
    "openbookqa": OPENBOOKQA,
    "piqa": PIQA,
    "social_i_qa": SOCIAL_I_QA,
    "hellaswag": HELLASWAG,
    "winogrande": WINOGRANDE,
    "skills": SKILLS,
}


def find_task(name: str) -> ChoiceTask:
    """The task of that name, or the one that a .yaml file describes."""
    if is_task_file(name):
        return load_task(name)
    if is_skills(name):
        return skills_task(name)
    if name not in TASKS:
        raise ConfigError(
            f"{suggestion(name, TASKS)}task must be one of {', '.join(TASKS)}, or a task's .yaml "
            f"file, got {name!r}"
        )
    return TASKS[name]
