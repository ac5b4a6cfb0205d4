"""The choice tasks by name."""

from __future__ import annotations

from loraloom.config.data import is_task_file
from loraloom.data.names import suggestion
from loraloom.data.tasks.arc import ARC_CHALLENGE, ARC_EASY
from loraloom.data.tasks.boolq import BOOLQ
from loraloom.data.tasks.choice_task import ChoiceTask
from loraloom.data.tasks.hellaswag import HELLASWAG
from loraloom.data.tasks.openbookqa import OPENBOOKQA
from loraloom.data.tasks.piqa import PIQA
from loraloom.data.tasks.skills import SKILLS
from loraloom.data.tasks.social_i_qa import SOCIAL_I_QA
from loraloom.data.tasks.task_file import load_task
from loraloom.data.tasks.winogrande import WINOGRANDE
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
    """The task of that name, or the one that a .yaml file describes.

    Raises:
        ConfigError: If there is none, or for the faults of the file.
        DataError: If a template in the file is not valid Jinja.
    """
    if is_task_file(name):
        return load_task(name)
    if name not in TASKS:
        raise ConfigError(
            f"{suggestion(name, TASKS)}task must be one of {', '.join(TASKS)}, or a task's .yaml "
            f"file, got {name!r}"
        )
    return TASKS[name]
