r"""A choice task of one's own: what its YAML file says.

data: {files: {train: train.jsonl, test: test.jsonl}}
template: "Question: {{ question }}\nAnswer:"
choices: options
answer: answer
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from loraloom.config.data import Scoring
from loraloom.config.fields import CheckInfo, StrictModel


class TaskDataConfig(StrictModel):
    """Where a task's rows are: local files, or a data set on the hub."""

    files: dict[str, str] | None = Field(default=None, min_length=1)
    """The file of each split: .json, .jsonl, .csv or .parquet, all of them also gzipped.

    A relative path starts at the task's file."""
    hub: str | None = Field(default=None, min_length=1)
    """Id of a data set on the Hugging Face hub."""
    config: str | None = Field(default=None, min_length=1)
    """Hub: which of its configurations."""
    revision: str | None = Field(default=None, min_length=1)
    """Hub: commit, tag or branch; a commit makes results repeatable."""

    @field_validator("config", "revision")
    @classmethod
    def _check_has_hub(cls, value: str | None, info: CheckInfo) -> str | None:
        if value is not None and info.data.get("hub") is None:
            raise ValueError(f"{info.field_name} has no effect without hub; remove it")
        return value

    @model_validator(mode="after")
    def _check_one_origin(self) -> TaskDataConfig:
        if (self.hub is None) == (self.files is None):
            raise ValueError("hub or files must be given, one of them")
        return self


class TaskConfig(StrictModel):
    """A choice task: its data, and how a row becomes a question.

    A template is Jinja over the row's fields, and `choice_texts` and `choice_labels`. A field may
    be one inside another: `choices.text`.
    """

    data: TaskDataConfig | None = None
    """Where its rows are; null where they are always given with --data or path."""
    evaluation_split: str = Field(default="test", min_length=1)
    """Split that is scored by default."""
    scoring: Scoring = "text"
    """Default: whether the answer is the choice's label or its own text."""
    template: dict[str, str]
    """The prompt; one for each scoring, {label: ..., text: ...}, or one for `scoring` alone."""
    choices: str | tuple[str, ...]
    """The choices' texts: the field that lists them, or a list of templates, one a choice."""
    labels: str | tuple[str, ...] | None = None
    """The choices' labels: the field that lists them, or a list; null for A, B, C, ..."""
    answer: str = Field(min_length=1)
    """The right choice: a field, or a template."""
    answer_is: Literal["label", "index", "text"] = "label"
    """Whether the answer is the choice's label, its index from 0, or its text."""
    delimiter: str = " "
    """What stands between prompt and answer."""
    normalization: Literal["characters", "none"] = "characters"
    """Scoring text: compare log-likelihoods per character (lm-eval's acc_norm), or sums (acc)."""
    group: str | None = Field(default=None, min_length=1)
    """A field by which results are also given apart, a topic say."""

    @field_validator("template", mode="before")
    @classmethod
    def _name_scoring(cls, template: Any, info: CheckInfo) -> Any:
        return {info.data.get("scoring", "text"): template} if _is_text(template) else template

    @field_validator("template")
    @classmethod
    def _check_scorings(cls, template: dict[str, str], info: CheckInfo) -> dict[str, str]:
        known = get_args(Scoring)
        unknown = sorted(set(template) - set(known))
        if unknown or not template:
            raise ValueError(
                f"template must be a text, or map {' or '.join(known)} to one, got "
                f"{', '.join(unknown) or 'nothing'}"
            )
        scoring = info.data.get("scoring")
        if scoring is not None and scoring not in template:
            raise ValueError(
                f"template must have one for scoring {scoring}, got {', '.join(template)} alone"
            )
        return template

    @field_validator("choices", "labels", mode="plain")
    @classmethod
    def _check_texts(cls, value: Any, info: CheckInfo) -> Any:
        if _is_text(value) or (value is None and info.field_name == "labels"):
            return value
        if not isinstance(value, list | tuple) or len(value) < 2 or not all(map(_is_text, value)):
            raise ValueError(
                f"{info.field_name} must be a field's name or a list of two or more texts (yes, no "
                f"and numbers in quotes), got {value!r}"
            )
        return tuple(value)

    @field_validator("labels")
    @classmethod
    def _check_as_many_labels(cls, labels: Any, info: CheckInfo) -> Any:
        choices = info.data.get("choices")
        if isinstance(labels, tuple) and isinstance(choices, tuple) and len(labels) != len(choices):
            raise ValueError(
                f"labels must be as many as the {len(choices)} choices, got {len(labels)}"
            )
        return labels


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
