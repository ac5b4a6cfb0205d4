"""Data: reading, prompts, tokens; choice tasks for training and evaluation."""

from loraloom.data.examples import (
    NO_LOSS,
    ChoiceQuestion,
    Example,
    PreferencePair,
)
from loraloom.data.questions import load_questions
from loraloom.data.tasks import TASKS, find_task
from loraloom.data.tokenising import encode_pair, encode_pairs
from loraloom.data.training_set import TrainingSet, load_training_set

__all__ = [
    "NO_LOSS",
    "TASKS",
    "ChoiceQuestion",
    "Example",
    "PreferencePair",
    "TrainingSet",
    "encode_pair",
    "encode_pairs",
    "find_task",
    "load_questions",
    "load_training_set",
]
