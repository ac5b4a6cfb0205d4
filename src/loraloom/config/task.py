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

Texts = str | tuple[str, ...]
AnswerKind = Literal["label", "index", "text"]
Normalization = Literal["characters", "none"]


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


def _check_texts(value: Any, info: CheckInfo) -> Any:
    if isinstance(value, list | tuple) and len(value) > 1 and all(map(_is_text, value)):
        return tuple(value)
    if not _is_text(value):
        raise ValueError(
            f"{info.field_name} must be a field's name or a list of two or more texts (yes, no "
            f"and numbers in quotes), got {value!r}"
        )
    return value


def _check_labels(value: Any, info: CheckInfo) -> Any:
    labels, choices = None if value is None else _check_texts(value, info), info.data.get("choices")
    if isinstance(labels, tuple) and isinstance(choices, tuple) and len(labels) != len(choices):
        raise ValueError(f"labels must be as many as the {len(choices)} choices, got {len(labels)}")
    return labels


class AskedConfig(StrictModel):
    """What differs in a scoring: settings as the task has them."""

    choices: Texts | None = None
    labels: Texts | None = None
    answer: str | None = Field(default=None, min_length=1)
    answer_is: AnswerKind | None = None
    continuation: str | None = Field(default=None, min_length=1)
    normalization: Normalization | None = None

    _check_choices = field_validator("choices", mode="plain")(_check_texts)
    _check_labels = field_validator("labels", mode="plain")(_check_labels)


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
    choices: Texts
    """The choices' texts: the field that lists them, or a list of templates, one a choice."""
    labels: Texts | None = None
    """The choices' labels: the field that lists them, or a list; null for A, B, C, ..."""
    answer: str = Field(min_length=1)
    """The right choice: a field, or a template."""
    answer_is: AnswerKind = "label"
    """Whether the answer is the choice's label, its index from 0, or its text."""
    continuation: str | None = Field(default=None, min_length=1)
    """Template of what is scored in place of the choice. The prompt is then made for each choice,
    which its template sees as `choice`."""
    delimiter: str = " "
    """What stands between prompt and answer."""
    normalization: Normalization = "characters"
    """Scoring text: compare log-likelihoods per character (lm-eval's acc_norm), or sums (acc)."""
    group: str | None = Field(default=None, min_length=1)
    """A field by which results are also given apart, a topic say."""
    label: AskedConfig = AskedConfig()
    """What differs where labels are scored."""
    text: AskedConfig = AskedConfig()
    """What differs where texts are scored."""

    _check_choices = field_validator("choices", mode="plain")(_check_texts)
    _check_labels = field_validator("labels", mode="plain")(_check_labels)

    def asked_by(self, scoring: Scoring) -> TaskConfig:
        """The task with what differs in a scoring."""
        differing = self.label if scoring == "label" else self.text
        return self.model_copy(update=differing.model_dump(exclude_none=True))

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


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
